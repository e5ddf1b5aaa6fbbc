# SPDX-License-Identifier: Apache-2.0
"""Glue for frameworks, a module each; none is imported by `quire` itself."""
