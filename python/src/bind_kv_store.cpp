// SPDX-License-Identifier: Apache-2.0
// HostStore and FileStore. A ticket keeps the buffer of its request alive and waits for it before
// it lets go.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <system_error>

#include "kv_store.h"
#include "named.h"
#include "quire/error.h"

namespace quire::python {
namespace {

// A buffer of the caller's, without a copy.
class Buffer {
 public:
  Buffer(nb::handle object, const char* name, bool writable) {
    const int flags = writable ? PyBUF_WRITABLE : PyBUF_SIMPLE;
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) {
      PyErr_Clear();
      throw nb::type_error(concat(name, ": expected a contiguous ", writable ? "writable " : "",
                                  "buffer, got ", nb::cast<std::string>(nb::inst_name(object)))
                               .c_str());
    }
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { PyBuffer_Release(&view_); }

  std::span<std::byte> bytes() const {
    return {static_cast<std::byte*>(view_.buf), static_cast<size_t>(view_.len)};
  }

 private:
  Py_buffer view_;
};

struct PyTicket {
  std::shared_ptr<KVTicket> ticket;
  std::unique_ptr<Buffer> buffer;

  PyTicket(std::shared_ptr<KVTicket> t, std::unique_ptr<Buffer> b)
      : ticket(std::move(t)), buffer(std::move(b)) {}
  PyTicket(PyTicket&&) = default;
  ~PyTicket() {
    if (ticket) wait();
  }
  KVOutcome wait() const {
    if (ticket->outcome() == KVOutcome::kPending) {
      nb::gil_scoped_release unlocked;
      ticket->wait();
    }
    return ticket->outcome();
  }
};

struct PyHostStore : PyStore {};
struct PyFileStore : PyStore {};

const char* name_of(KVOutcome outcome) {
  static constexpr const char* kNames[] = {"pending", "done", "missing", "failed"};
  return kNames[static_cast<int>(outcome)];
}

ChainKey parse_key(nb::handle object, const char* name) {
  const Buffer buffer(object, name, false);
  ChainKey key;
  QUIRE_CHECK_ARG(buffer.bytes().size() == sizeof key, name, ": expected 32 bytes, got ",
                  buffer.bytes().size());
  std::memcpy(key.bytes.data(), buffer.bytes().data(), sizeof key);
  return key;
}

std::optional<PyTicket> put(PyStore& self, nb::handle key, nb::handle payload) {
  const ChainKey chain_key = parse_key(key, "put: key");
  auto buffer = std::make_unique<Buffer>(payload, "put: payload", false);
  auto ticket = self.store->put(chain_key, buffer->bytes());
  if (!ticket) return std::nullopt;
  return PyTicket(std::move(ticket), std::move(buffer));
}

std::optional<PyTicket> get(PyStore& self, nb::handle key, nb::handle out) {
  const ChainKey chain_key = parse_key(key, "get: key");
  auto buffer = std::make_unique<Buffer>(out, "get: out", true);
  auto ticket = self.store->get(chain_key, buffer->bytes());
  if (!ticket) return std::nullopt;
  return PyTicket(std::move(ticket), std::move(buffer));
}

nb::dict stats(const PyStore& self) {
  const KVStoreStats stats = self.store->stats();
  nb::dict d;
  d["num_blocks"] = stats.num_blocks;
  d["capacity_blocks"] = stats.capacity_blocks;
  d["num_pending"] = stats.num_pending;
  d["stored"] = stats.stored;
  d["hits"] = stats.hits;
  d["misses"] = stats.misses;
  d["evicted"] = stats.evicted;
  d["not_taken"] = stats.not_taken;
  d["failed"] = stats.failed;
  d["dropped"] = stats.dropped;
  d["callback_errors"] = stats.callback_errors;
  return d;
}

void bind_ticket(nb::module_& m) {
  nb::class_<PyTicket>(
      m, "KVTicket",
      "A request that a KVStore has taken. It keeps the request's buffer alive; dropping it\n"
      "waits until the store needs the buffer no more.\n\n"
      "Example::\n\n    ticket = store.get(key, out)\n"
      "    if ticket is not None and ticket.wait() == \"done\":\n        ...")
      .def_prop_ro(
          "outcome", [](const PyTicket& t) { return name_of(t.ticket->outcome()); },
          "\"pending\", \"done\", \"missing\" (get) or \"failed\" (put).")
      .def(
          "wait", [](const PyTicket& t) { return name_of(t.wait()); },
          "Waits for the outcome and returns it.\n\nExample::\n\n    ticket.wait()");
}

void bind_store(nb::module_& m) {
  nb::class_<PyStore>(
      m, "KVStore",
      "A slower place for the contents of KV blocks, found again by chain key: HostStore,\n"
      "FileStore. All methods may be called from any thread.\n\n"
      "Example::\n\n    store = quire.HostStore(capacity_bytes=8 << 30, block_bytes=block.nbytes)\n"
      "    key = quire.chain_keys(prompt, block_size=16)[0]\n    ticket = store.put(key, block)")
      .def(
          named("put", &put), nb::arg("key"), nb::arg("payload"),
          nb::sig("def put(self, key: typing.Any, payload: typing.Any) -> KVTicket | None"),
          "Stores a payload, block_bytes bytes of a contiguous buffer, under a key of 32 bytes.\n\n"
          "None: the queue is full and nothing has changed. The payload must not change while\n"
          "the ticket is pending. A key that is there keeps its block. Raises ValueError for a\n"
          "wrong size, TypeError for what is no contiguous buffer.\n\n"
          "Example::\n\n    ticket = store.put(keys[0], block)")
      .def(named("get", &get), nb::arg("key"), nb::arg("out"),
           nb::sig("def get(self, key: typing.Any, out: typing.Any) -> KVTicket | None"),
           "Fills `out`, block_bytes bytes of a writable contiguous buffer, with a payload.\n\n"
           "None: the queue is full. Unless the outcome is \"done\", `out` may hold anything.\n"
           "Gets do not wait for puts that wait.\n\n"
           "Example::\n\n    store.get(keys[0], out).wait()")
      .def(named("contains",
                 [](const PyStore& s, nb::handle key) {
                   return s.store->contains(parse_key(key, "contains: key"));
                 }),
           nb::arg("key"), nb::sig("def contains(self, key: typing.Any) -> bool"),
           "Whether a put of this key has completed, and the block is still there.\n\n"
           "Example::\n\n    store.contains(keys[0])")
      .def(named("erase",
                 [](PyStore& s, nb::handle key) {
                   return s.store->erase(parse_key(key, "erase: key"));
                 }),
           nb::arg("key"), nb::sig("def erase(self, key: typing.Any) -> bool"),
           "Gives a block up; False if it was not there. A put that waits is not undone.\n\n"
           "Example::\n\n    store.erase(keys[0])")
      .def(
          "drain", [](PyStore& s) { s.store->drain(); }, nb::call_guard<nb::gil_scoped_release>(),
          "Waits until every request taken so far has completed.\n\n"
          "Example::\n\n    store.drain()")
      .def_prop_ro(
          "tier", [](const PyStore& s) { return tier_name(s.store->tier()); },
          "\"host\" or \"file\".")
      .def_prop_ro(
          "block_bytes", [](const PyStore& s) { return s.store->block_bytes(); },
          "Bytes of a payload.")
      .def("stats", &stats, nb::sig("def stats(self) -> dict[str, int]"),
           "Counts: num_blocks, capacity_blocks, num_pending now; stored, hits, misses, evicted,\n"
           "not_taken (queue full), failed (puts), dropped (torn or rotten blocks, never\n"
           "delivered), callback_errors since the start.\n\n"
           "Example::\n\n    store.stats()[\"hits\"]");
}

void bind_stores(nb::module_& m) {
  nb::class_<PyHostStore, PyStore>(
      m, "HostStore",
      "Blocks in host memory; the least recently used are given up beyond capacity_bytes.\n\n"
      "Up to max_pending gets and as many puts may wait. Raises ValueError unless a block fits.\n\n"
      "Example::\n\n    store = quire.HostStore(capacity_bytes=8 << 30, block_bytes=2 << 20)")
      .def(named("__init__",
                 [](PyHostStore* self, int64_t capacity_bytes, int64_t block_bytes,
                    int32_t max_pending) {
                   new (self)
                       PyHostStore{{make_host_store({capacity_bytes, block_bytes, max_pending})}};
                 }),
           nb::arg("capacity_bytes"), nb::arg("block_bytes"), nb::arg("max_pending") = 64,
           nb::sig("def __init__(self, capacity_bytes: int, block_bytes: int, max_pending: int = "
                   "64) -> None"));
  nb::class_<PyFileStore, PyStore>(
      m, "FileStore",
      "Blocks in a directory of checksummed files, found again by the next process.\n\n"
      "`identity` says what the bytes mean (model, dtype, layout). A process killed at any\n"
      "moment loses at most the puts that had not completed; torn or rotten files are dropped\n"
      "and counted, never delivered. Raises ValueError for a directory of another block_bytes\n"
      "or identity or one in use, OSError for one that can't be used.\n\n"
      "Example::\n\n    store = quire.FileStore(\"kv\", capacity_bytes=100 << 30,\n"
      "                            block_bytes=2 << 20, identity=\"llama-3-8b bf16\")")
      .def(named("__init__",
                 [](PyFileStore* self, std::string path, int64_t capacity_bytes,
                    int64_t block_bytes, std::string identity, int32_t max_pending) {
                   new (self) PyFileStore{{open_file_store(
                       {path, capacity_bytes, block_bytes, identity, max_pending})}};
                 }),
           nb::arg("path"), nb::arg("capacity_bytes"), nb::arg("block_bytes"),
           nb::arg("identity") = "", nb::arg("max_pending") = 64,
           nb::sig("def __init__(self, path: str, capacity_bytes: int, block_bytes: int, identity: "
                   "str = '', max_pending: int = 64) -> None"));
}

}  // namespace

void bind_kv_store(nb::module_& m) {
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const std::system_error& e) {
      PyErr_SetString(PyExc_OSError, e.what());
    }
  });
  bind_ticket(m);
  bind_store(m);
  bind_stores(m);
}

}  // namespace quire::python
