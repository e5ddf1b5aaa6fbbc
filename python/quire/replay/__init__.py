# SPDX-License-Identifier: Apache-2.0
"""Replay of request traces through Scheduler, KVCacheManager and attention, for `quire replay`.

trace and synthetic make a Trace, tokens turns it into token ids, engine runs it under a policy
(policies), attention computes a layer of each step, verify checks rows of it, and table and report
show the results.
"""
