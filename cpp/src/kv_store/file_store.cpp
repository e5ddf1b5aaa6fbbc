// SPDX-License-Identifier: Apache-2.0
// A directory of block files. One thread writes files, another reads them, so that a read never
// waits for the disk to take what is written; a file that is unlinked under a reader is a miss.
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <system_error>

#include "kv_store/block_file.h"
#include "kv_store/indexed_store.h"
#include "quire/error.h"

namespace quire {
namespace {

constexpr char kTemporary[] = "unfinished-";  // begins the names of files that are being written
constexpr int32_t kMaxBatch = 16;             // files that are synced together
constexpr char kDescription[] = "quire-store";

// What a directory holds, as text; a directory without it is a new one.
std::string describe(const FileStoreConfig& config) {
  return concat("quire kv store 1\nblock_bytes ", config.block_bytes, "\nidentity ",
                config.identity, "\n");
}

std::string read_text(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

class FileStore final : public IndexedStore {
 public:
  explicit FileStore(const FileStoreConfig& config)
      : IndexedStore("FileStore", config.capacity_bytes, config.block_bytes),
        folder_(make_folder(config.path)),
        folder_file_(folder_, O_RDONLY | O_DIRECTORY),
        lock_file_(folder_ + "lock", O_RDWR | O_CREAT),
        worker_(config.max_pending,
                {.get = [this](const StoreRequest& request) { return run_get(request); },
                 .put = [this](auto requests, auto outcomes) { run_puts(requests, outcomes); },
                 .max_batch = static_cast<size_t>(std::min(kMaxBatch, index_.capacity())),
                 .gets_have_a_thread = true}) {
    QUIRE_CHECK_ARG(::flock(lock_file_.fd(), LOCK_EX | LOCK_NB) == 0, "FileStore: path: expected ",
                    "a directory that no other store has open, got ", config.path);
    check_description(config);
    list_folder();
  }

  CacheTier tier() const override { return CacheTier::kFile; }

 private:
  StoreWorker& worker() override { return worker_; }
  const StoreWorker& worker() const override { return worker_; }

  // So that they outlive a power failure. Not every file system can; then that alone is lost.
  void sync_names() const { ::fsync(folder_file_.fd()); }

  static std::string make_folder(const std::string& path) {
    std::filesystem::create_directories(path);
    return path + "/";
  }

  void check_description(const FileStoreConfig& config) {
    const std::string path = folder_ + kDescription;
    const std::string expected = describe(config);
    if (!std::filesystem::exists(path)) {
      write_synced(folder_ + kTemporary, std::as_bytes(std::span(expected)));
      std::filesystem::rename(folder_ + kTemporary, path);
      sync_names();
    }
    const std::string found = read_text(path);
    QUIRE_CHECK_ARG(found == expected, "FileStore: path: expected a directory with\n", expected,
                    "got one with\n", found);
  }

  // Indexes what is there, the oldest first. Of two files of one key the newer one stays.
  void list_folder() {
    std::vector<BlockFileName> names = list_block_files(folder_);
    std::sort(names.begin(), names.end(),
              [](const BlockFileName& a, const BlockFileName& b) { return a.age < b.age; });
    index_.reserve(static_cast<int32_t>(std::min<size_t>(names.size(), index_.capacity())));
    for (const BlockFileName& name : names) {
      const int32_t known = index_.find(name.key);
      if (known != StoreIndex::kNone) erase_slot(known);
      fill(take_slot(), name);
    }
    if (!names.empty()) next_age_ = names.back().age + 1;
    for (int32_t i = 0; i < kMaxBatch; ++i) ::unlink(temporary(i).c_str());
  }

  std::string path_of(int32_t slot) const {
    return folder_ + block_file_name({ages_[slot], index_.key(slot)});
  }

  // The functions below want mutex_ held, once the worker runs.
  void fill(int32_t slot, const BlockFileName& name) {
    if (static_cast<size_t>(slot) >= ages_.size()) ages_.resize(slot + 1);
    ages_[slot] = name.age;
    index_.fill(slot, name.key);
  }

  void erase_slot(int32_t slot) override {
    ::unlink(path_of(slot).c_str());
    index_.erase(slot);
  }

  std::string temporary(size_t i) const { return folder_ + kTemporary + std::to_string(i); }

  // A put of a batch that needs a file.
  struct Write {
    size_t request;
    int32_t slot;
    std::string temporary;
    std::unique_ptr<File> file;  // null: failed
  };

  // Slots for those keys that are not there, nor in the batch before.
  std::vector<Write> plan_writes(std::span<const StoreRequest> requests,
                                 std::span<KVOutcome> outcomes) {
    std::vector<Write> writes;
    writes.reserve(requests.size());
    const std::lock_guard lock(mutex_);
    for (size_t i = 0; i < requests.size(); ++i) {
      const int32_t known = index_.find(requests[i].key);
      if (known == StoreIndex::kNone) continue;
      index_.touch(known);
      outcomes[i] = KVOutcome::kDone;
    }
    for (size_t i = 0; i < requests.size(); ++i)
      if (outcomes[i] != KVOutcome::kDone && first_of(requests, i) == i)
        writes.push_back({i, take_slot(), temporary(i), nullptr});
    return writes;
  }

  // The first request of the same key.
  static size_t first_of(std::span<const StoreRequest> requests, size_t i) {
    const auto is_same = [&](const StoreRequest& r) { return r.key == requests[i].key; };
    return static_cast<size_t>(std::find_if(requests.begin(), requests.end(), is_same) -
                               requests.begin());
  }

  // All files are written first and synced then: the disk takes them in one go.
  void run_puts(std::span<const StoreRequest> requests, std::span<KVOutcome> outcomes) {
    std::vector<Write> writes = plan_writes(requests, outcomes);
    for (Write& write : writes) {
      const StoreRequest& request = requests[write.request];
      write.file = write_block_file(write.temporary, request.key, request.payload);
    }
    for (const Write& write : writes)
      outcomes[write.request] =
          finish(write, requests[write.request].key) ? KVOutcome::kDone : KVOutcome::kFailed;
    for (size_t i = 0; i < requests.size(); ++i) outcomes[i] = outcomes[first_of(requests, i)];
    if (!writes.empty()) sync_names();  // before anybody is told of them
  }

  // Gives a written file its name, and the index its slot; false: it failed and left no trace.
  bool finish(const Write& write, const ChainKey& key) {
    const BlockFileName name{next_age_++, key};
    const std::string path = folder_ + block_file_name(name);
    const bool is_good = write.file && ::fsync(write.file->fd()) == 0 &&
                         ::rename(write.temporary.c_str(), path.c_str()) == 0;
    if (!is_good) ::unlink(write.temporary.c_str());
    const std::lock_guard lock(mutex_);
    if (is_good) {
      fill(write.slot, name);
      ++stats_.stored;
    } else {
      index_.give_back(write.slot);
    }
    return is_good;
  }

  KVOutcome run_get(const StoreRequest& request) {
    std::string path;
    {
      const std::lock_guard lock(mutex_);
      const int32_t slot = index_.find(request.key);
      if (slot == StoreIndex::kNone) {
        ++stats_.misses;
        return KVOutcome::kMissing;
      }
      index_.touch(slot);
      path = path_of(slot);
    }
    std::optional<BlockFileState> state;
    try {
      state = read_block_file(path, request.key, request.out);
    } catch (const std::system_error&) {  // too many open files, say: no word on the file itself
    }
    const std::lock_guard lock(mutex_);
    if (state == BlockFileState::kGood) {
      ++stats_.hits;
      return KVOutcome::kDone;
    }
    ++stats_.misses;
    if (!state) return KVOutcome::kMissing;
    // erase() may have been faster; a new file of the key would have another name.
    const int32_t slot = index_.find(request.key);
    if (slot != StoreIndex::kNone && path_of(slot) == path) {
      erase_slot(slot);
      ++stats_.dropped;
    }
    return KVOutcome::kMissing;
  }

  std::vector<uint64_t> ages_;  // by slot; under mutex_
  uint64_t next_age_ = 0;       // the writing thread's
  const std::string folder_;    // with a slash at the end
  const File folder_file_;      // the directory itself
  const File lock_file_;        // closed, and so unlocked, when the process ends in any way
  StoreWorker worker_;          // last: its threads use all of the above
};

}  // namespace

std::unique_ptr<KVStore> open_file_store(const FileStoreConfig& config) {
  return std::make_unique<FileStore>(config);
}

}  // namespace quire
