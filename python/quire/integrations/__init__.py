# SPDX-License-Identifier: Apache-2.0
"""quire inside other people's software; each module imports its framework, quire itself none."""
