# SPDX-License-Identifier: Apache-2.0
"""`quire bench`: attention on this machine against its roofs and the peers that are installed."""
