// SPDX-License-Identifier: Apache-2.0
// doctest itself, which takes longer to compile than most tests: once for all of them.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
