# SPDX-License-Identifier: Apache-2.0
"""quire inside other frameworks: each module is imported only where its framework is in use."""
