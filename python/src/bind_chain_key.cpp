// SPDX-License-Identifier: Apache-2.0
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>

#include "named.h"
#include "quire/chain_key.h"
#include "quire/error.h"
#include "tensor.h"

namespace quire::python {
namespace {

nb::object keys_of(nb::handle token_ids, int32_t block_size, std::optional<std::string_view> salt) {
  const Int32Arg tokens(token_ids, "chain_keys: token_ids");
  QUIRE_CHECK_ARG(block_size >= 1, "chain_keys: block_size: expected 1 or more, got ", block_size);
  const size_t count = tokens.size() / static_cast<size_t>(block_size);
  auto* keys = new ChainKey[count];
  const nb::capsule owner(keys, [](void* p) noexcept { delete[] static_cast<ChainKey*>(p); });
  {
    nb::gil_scoped_release unlocked;
    chain_keys(root_key(salt), {tokens.data(), tokens.size()}, block_size, {keys, count});
  }
  const size_t shape[] = {count, sizeof(ChainKey)};
  return nb::cast(nb::ndarray<nb::numpy, uint8_t>(keys, 2, shape, owner));
}

}  // namespace

void bind_chain_key(nb::module_& m) {
  def_named(
      m, "chain_keys", &keys_of, nb::arg("token_ids"), nb::arg("block_size"),
      nb::arg("salt") = nb::none(),
      nb::sig("def chain_keys(token_ids: numpy.typing.ArrayLike, block_size: int, "
              "salt: str | None = None) -> numpy.typing.NDArray[numpy.uint8]"),
      "The SHA-256 chain keys of the full blocks of int32 [n] tokens: uint8 [n // block_size, "
      "32].\n\n"
      "A key names a block and everything before it, the same in every process and on every\n"
      "machine: key i is SHA256(key i-1 || the block's tokens, int32 little-endian); before\n"
      "the first comes the root key, SHA256(b\"quire.chain_key.v1\\n\") without a salt and\n"
      "SHA256(b\"quire.chain_key.v1\\nsalt=\" + salt) with one (UTF-8). Tokens behind the last\n"
      "full block have no key. Raises ValueError for a block_size below 1.\n\n"
      "Example::\n\n    keys = quire.chain_keys(prompt, block_size=16)\n"
      "    store.put(keys[0], payload)");
}

}  // namespace quire::python
