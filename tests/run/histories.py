"""Random histories of a run: processes begin, seal, send, die, are told to stop, lose their disks,
and another number of them resumes the run, of which a file was damaged. Run by test_histories.py in
a process of its own.

    python tests/run/histories.py HISTORIES SEED FOLDER

The run loop, the folders and the uploads are the real ones; a fake computation stands in for the
model, a folder for the bucket, and sockets for the network between the processes, which are forked.
After every session, whatever ended it: what any manifest lists is there, and no sample is listed
twice. In the end every sample is stored once, with its answer, and the bucket holds all of it.
"""

import contextlib
import fcntl
import io
import json
import os
import random
import select
import shutil
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1] / "shards"))
sys.path.insert(0, str(Path(__file__).parents[2]))

from shard_crashes import item

from utils.arc.tasks import Pair, Task
from utils.cli import Interrupted
from utils.errors import UserError
from utils.model.capture import CaptureSpec
from utils.plan.batching import Batch, Length
from utils.plan.request import Request
from utils.run import conclude, loop, opening
from utils.run.compute import Pass, Usage
from utils.run.peers import Peers
from utils.shards import manifest as manifests
from utils.shards import uploads
from utils.shards.items import load
from utils.shards.manifest import read_manifest, read_manifests, shards_of
from utils.store.bucket import NameTaken, Receipt, Stopped
from utils.store.local import Sink, checksum

SAMPLES, SHAPES = 23, (1, 2, 3)
BUCKET = "gs://fake/run"


# ------------------------------------------------------------------------------ stand-ins


class FolderBucket:
    """A `BucketFolder` whose objects are files of a folder, a receipt in the first line of each."""

    uri, bytes_read = BUCKET, 0

    def __init__(self, folder: Path):
        self.folder, self.token = folder, os.urandom(8).hex()
        folder.mkdir(exist_ok=True)

    def __str__(self) -> str:
        return self.uri

    def uri_of(self, name: str) -> str:
        return f"{self.uri}/{name}"

    def listing(self) -> dict[str, Receipt]:
        return {name: self.find(name)[0] for name in self.names()}

    def names(self) -> list[str]:
        return sorted(os.listdir(self.folder))

    def find(self, name: str) -> tuple[Receipt, str] | None:
        path = self.folder / name
        if not path.exists():
            return None
        *receipt, token = json.loads(path.read_bytes().partition(b"\n")[0])
        return Receipt(*receipt), token

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes().partition(b"\n")[2]

    def open(self, name: str):
        return io.BytesIO(self.read(name))

    def put(self, source, name, size, crc32c, *, stopping, replaces=0, exclusive=False, **_):
        if stopping.is_set():
            raise Stopped(name)
        content = source[:size] if isinstance(source, bytes) else source.read_bytes()[:size]
        assert checksum(io.BytesIO(content)) == crc32c
        with open(self.folder.parent / "bucket.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            there = self.find(name)
            if there and there[0].generation != replaces:
                if there[0].holds(size, crc32c) and (not exclusive or there[1] == self.token):
                    return there[0]
                raise NameTaken(f"{name} is not what was to be there", exit_code=1)
            receipt = Receipt(self.uri_of(name), size, crc32c, random.getrandbits(40))
            made = [receipt.uri, size, crc32c, receipt.generation, self.token]
            temporary = self.folder.parent / "object"
            temporary.write_bytes(json.dumps(made).encode() + b"\n" + content)
            _rename(temporary, self.folder / name)
            return receipt

    def check_holds(self, name: str, size: int, crc32c: str) -> None:
        found = self.find(name)
        if found is None or not found[0].holds(size, crc32c):
            raise UserError(f"{name} is not what was uploaded")


_rename = os.rename


class SocketPeers(Peers):
    """One of several processes, whose parent passes on what each says; see `relay`."""

    def __init__(self, index: int, count: int, sock: socket.socket):
        self.index, self.count, self._sock = index, count, sock
        self._file = sock.makefile("rb")
        self._left = False

    def _hear(self):
        line = self._file.readline()
        said = json.loads(line) if line else {"end": "the relay is gone"}
        if "end" in said:
            if "signum" in said:
                raise Interrupted(said["signum"])
            raise UserError(f"another process ended: {said['end']}", 1)
        return said["values"]

    def _say(self, **words):
        with contextlib.suppress(OSError):
            self._sock.sendall(json.dumps(words).encode() + b"\n")

    def exchange(self, name, value):
        self._say(name=name, value=value)
        return self._hear()

    def gather(self, value):
        values = self.exchange("gather", value)
        return values if self.index == 0 else []

    @contextlib.contextmanager
    def together(self, step):
        try:
            yield
        except BaseException as error:
            self.leaving(error)
            raise
        self.exchange(step, None)

    def check(self):
        self._signals.check()
        if select.select([self._sock], [], [], 0)[0]:
            self._hear()

    def leaving(self, error):
        if not self._left:
            self._left = True
            signum = {"signum": error.signum} if isinstance(error, Interrupted) else {}
            self._say(end=str(error), **signum)


def relay(socks: list[socket.socket]) -> None:
    """Answers every exchange once all have spoken, and tells all when one has ended."""
    waiting: dict[int, dict] = {}
    buffers = {sock: b"" for sock in socks}
    open_ones = set(socks)
    ended = None
    while open_ones:
        for sock in select.select(list(open_ones), [], [])[0]:
            with contextlib.suppress(ConnectionError):
                buffers[sock] += (data := sock.recv(1 << 20))
                if data:
                    continue
            open_ones.discard(sock)
            ended = ended or {"end": "gone"}
        for index, sock in enumerate(socks):
            while b"\n" in buffers[sock]:
                line, _, buffers[sock] = buffers[sock].partition(b"\n")
                said = json.loads(line)
                if "end" in said:
                    ended = ended or said
                else:
                    waiting[index] = said
        if not ended and len(waiting) == len(socks):
            names = {said["name"] for said in waiting.values()}
            assert len(names) == 1, f"processes say different things: {names}"
            values = [waiting[index]["value"] for index in range(len(socks))]
            waiting.clear()
            answer = json.dumps({"values": values}).encode() + b"\n"
        elif ended:
            answer = json.dumps(ended).encode() + b"\n"
        else:
            continue
        for sock in open_ones:
            with contextlib.suppress(OSError):
                sock.sendall(answer)


@dataclass
class Signals:
    """Notes one signal, when so many samples were stored."""

    after: int
    stored: int = 0

    def hold(self):
        pass

    def check(self):
        if self.stored > self.after:
            raise Interrupted(signal.SIGTERM)


class FakeComputation:
    """The rows of each batch that a process keeps, without a model."""

    compile_seconds = 0.0

    def __init__(self, plan):
        self.plan, self.usage = plan, Usage()

    def compile(self, batches):
        pass

    def passes(self, batches):
        return [Pass(batch, first=True, last=True) for batch in batches]

    def launch(self, job):
        return job.batch

    def fetch(self, batch):
        peers = self.plan.peers
        size = len(batch.rows) // peers.count
        mine = batch.rows[peers.index * size : (peers.index + 1) * size]
        return [
            SimpleNamespace(index=i, sample=self.plan.samples[i], nbytes=1, num_tokens=4)
            for i in mine
            if i >= 0
        ]


def key_of(index: int) -> tuple[str, int]:
    return f"task{index // 2}", index % 2


def fake_plan(root: Path, session, peers, bucket) -> SimpleNamespace:
    size = peers.count * session.batch
    order = list(range(SAMPLES))
    rows = [order[i : i + size] for i in range(0, SAMPLES, size)]
    batches = [Batch(None, tuple(row + [-1] * (size - len(row)))) for row in rows]
    folder = root / (f"acts{peers.index}" if session.separate else "acts")
    request = Request(
        model_path="model",
        dataset_path="tasks.json",
        output_path=str(root / "submission.json"),
        activations_dir=str(folder),
        save_every_n_samples=session.save_every,
        distributed=True,
        resume=session.resume,
        delete_after_upload=session.deletes and bucket is not None,
        upload_timeout=20,
    )
    grid = [[1]]
    tasks = [
        Task(f"task{t}", (), tuple(Pair(grid, None) for _ in range(min(2, SAMPLES - 2 * t))))
        for t in range((SAMPLES + 1) // 2)
    ]

    def without(done):
        todo = [
            Batch(None, tuple(i if i >= 0 and key_of(i) not in done else -1 for i in b.rows))
            for b in batches
        ]
        return [batch for batch in todo if max(batch.rows) >= 0]

    layout = SimpleNamespace(
        mesh=SimpleNamespace(devices=SimpleNamespace(flat=[])), data=peers.count, model=1
    )
    return SimpleNamespace(
        request=request,
        run_folder=folder,
        checkpoint=None,
        settings=lambda _: {"model": {"hash": "m"}, "activations": {}},
        samples=[
            SimpleNamespace(key=key_of(i), length=Length(4), cell_tokens=0) for i in range(SAMPLES)
        ],
        capture=CaptureSpec(),
        tasks=tasks,
        skipped=(),
        batches=batches,
        layout=layout,
        train_pairs={},
        codec=SimpleNamespace(tokenizer=SimpleNamespace(all_special_ids=[])),
        bucket=bucket,
        listing=bucket.listing() if bucket else {},
        without=without,
        peers=peers,
    )


# -------------------------------------------------------------------------------- sessions


@dataclass
class Session:
    count: int
    separate: bool
    batch: int
    save_every: int
    deletes: bool
    resume: bool
    sends: bool
    dies: dict[int, int]  # process -> the touch of disk or bucket at which it is gone
    stops: dict[int, int]  # process -> samples after which it is told to stop


def dying_at(step: int) -> None:
    """From here on, this process is gone at its `step`-th touch of disk or bucket."""
    left = step

    def touch(original, halfway=None):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                if halfway:
                    halfway(*args)
                os._exit(9)
            return original(*args, **kwargs)

        return call

    def half(sink, buffer):
        view = memoryview(buffer).cast("B")
        write(sink, bytes(view[: len(view) // 2]))

    write = Sink.write
    Sink.write = touch(write, half)
    os.fsync, os.replace, os.link = touch(os.fsync), touch(os.replace), touch(os.link)
    os.unlink = touch(os.unlink)
    FolderBucket.put = touch(FolderBucket.put)


def process(root: Path, session: Session, peers: Peers) -> None:
    """A process of a session; never returns."""
    code = 1
    try:
        bucket = FolderBucket(root / "bucket") if session.sends else None
        signals = peers._signals = Signals(session.stops.get(peers.index, 10**9))
        plan = fake_plan(root, session, peers, bucket)

        def to_item(result, plan):
            signals.stored += 1
            task, index = key_of(result.index)
            answer = {"task_id": task, "sample_idx": index, "attempts": [], "target": None}
            return item(result.index, 4, 2), {**answer, "correct": None}

        loop.to_item, loop.Computation = to_item, FakeComputation
        loop.check_disk = lambda *args, **kwargs: None
        opening.weights_hash = lambda *args: "m"
        opening._versions = dict
        conclude._useful = lambda usages: {}
        loop.STOP_SECONDS = 1
        uploads.MANIFEST_SECONDS, uploads.MANIFEST_SHARE = 0.001, 10
        if peers.index in session.dies:
            dying_at(session.dies[peers.index])
        loop.run(plan, signals, peers)
        code = 0
    except Interrupted:
        code = 143
    except UserError as error:
        code = 3
        print(f"process {peers.index}: {error}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_session(root: Path, session: Session) -> list[int]:
    """Exit codes of its processes."""
    pairs = [socket.socketpair() for _ in range(session.count)]
    children = []
    log = open(root / "log", "a")  # noqa: SIM115
    for index in range(session.count):
        if child := os.fork():
            children.append(child)
            continue
        os.dup2(log.fileno(), 2)
        for number, (ours, theirs) in enumerate(pairs):
            ours.close()
            if number != index:
                theirs.close()
        alone = session.count == 1
        process(
            root, session, Peers() if alone else SocketPeers(index, session.count, pairs[index][1])
        )
    for _, theirs in pairs:
        theirs.close()
    if session.count > 1:
        relay([ours for ours, _ in pairs])
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for ours, _ in pairs:
        ours.close()
    log.close()
    return codes


# ------------------------------------------------------------------------------ invariants


def folders(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("acts*") if path.is_dir())


def check(root: Path, bucket: FolderBucket | None) -> None:
    """What any manifest lists is there, and no sample is listed twice."""
    everything = []
    for folder in folders(root):
        found = read_manifests(folder)
        everything += found.values()
        owners = {manifests.owner_of(name) for name in found}
        for shard in shards_of(found.values()).values():
            path = folder / shard.filename
            if path.exists():
                with open(path, "rb") as file:
                    assert checksum(file) == shard.crc32c, path
                    file.seek(0)
                    keys = [(i["task_id"], i["sample_idx"]) for i in load(file)]
                    assert keys == list(shard.samples), path
            elif shard.uploaded:
                assert bucket.find(shard.filename)[0].crc32c == shard.crc32c
            else:  # it lies in the folder of another process
                assert shard.owner not in owners, path
    shards_of(everything)  # raises where a sample is listed twice
    if bucket is None:
        return
    names = set(bucket.names())
    for name in filter(manifests.MANIFEST.fullmatch, names):
        listed = shards_of([json.loads(bucket.read(name))])
        for shard in listed.values():
            assert shard.filename in names, (name, shard.filename)
            assert bucket.find(shard.filename)[0].crc32c == shard.crc32c
            answers = bucket.read(manifests.journal_name(shard.owner)).decode()
            for task, index in shard.samples:
                assert f'"task_id": "{task}", "sample_idx": {index}' in answers


def check_complete(root: Path, bucket: FolderBucket | None, count: int) -> None:
    first = folders(root)[0]
    manifest = read_manifest(first)
    assert manifest["status"] == "complete"
    listed = [tuple(key) for entry in manifest["files"] for key in entry["samples"]]
    assert sorted(listed) == sorted(key_of(i) for i in range(SAMPLES))
    assert len(json.loads((root / "submission.json").read_text())) == (SAMPLES + 1) // 2
    here = {key for folder in folders(root) for key in read_answers_of(folder)}
    assert here == set(listed)
    if bucket is None:
        return
    names = set(bucket.names())
    for entry in manifest["files"]:
        assert entry["uploaded"]["crc32c"] == entry["crc32c"]
        assert entry["filename"] in names
    assert json.loads(bucket.read("metadata.json")) == json.loads(
        (first / "metadata.json").read_text()
    )
    assert bucket.read("submission.json") == (root / "submission.json").read_bytes()


def read_answers_of(folder: Path) -> list[tuple[str, int]]:
    owners = {manifests.owner_of(name) for name in os.listdir(folder) if name.endswith(".jsonl")}
    shards = shards_of(read_manifests(folder).values()).values()
    return list(manifests.answers_to(folder, [s for s in shards if s.owner in owners]))


# ------------------------------------------------------------------------------- histories


def history(root: Path, rng: random.Random) -> str:
    """One history; returns what happened in it, in a line."""
    separate, sends = rng.random() < 0.35, rng.random() < 0.5
    fixed = rng.choice(SHAPES[1:])
    told = [f"{'separate' if separate else 'shared'}{', bucket' if sends else ''}"]
    bucket = FolderBucket(root / "bucket") if sends else None
    for number in range(rng.randint(2, 6)):
        count = fixed if separate else rng.choice(SHAPES)
        dies = {i: int(1 + 120 * rng.random() ** 2) for i in range(count) if rng.random() < 0.6}
        stops = {i: rng.randrange(SAMPLES) for i in range(count) if rng.random() < 0.15}
        session = Session(
            count,
            separate,
            batch=rng.choice((1, 2)),
            save_every=rng.choice((1, 2, 3)),
            deletes=rng.random() < 0.3,
            resume=number > 0 or rng.random() < 0.5,
            sends=sends,
            dies=dies,
            stops=stops,
        )
        codes = run_session(root, session)
        told.append(f"{count}: dies {dies}, stops {stops} -> {codes}")
        expected = {0, 9} if not dies and not stops else {0, 9, 3, 143}
        assert set(codes) <= expected, told
        _check_telling(root, bucket, told)
        lost = [f for f in folders(root) if rng.random() < 0.2]
        for folder in lost:  # with its machine
            shutil.rmtree(folder)
            told.append(f"lost {folder.name}")
            (root / "submission.json").unlink(missing_ok=True)
    count = fixed if separate else rng.choice(SHAPES)
    told += [damage(folder, rng) for folder in folders(root) if rng.random() < 0.5]
    last = Session(count, separate, 2, 2, False, True, sends, {}, {})
    codes = run_session(root, last)
    told.append(f"{count}: {codes}")
    assert codes == [0] * count, told
    check(root, bucket)
    check_complete(root, bucket, count)
    return "; ".join(told)


def damage(folder: Path, rng: random.Random) -> str:
    """Changes a bit of a shard, or loses one or what is behind a place of the answers."""
    if not (files := [*folder.glob("*.pkl"), *folder.glob("*.jsonl")]):
        return "nothing to damage"
    path = rng.choice(sorted(files))
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content) + 1)
    if path.suffix == ".jsonl":
        path.write_bytes(content[:place])
    elif rng.random() < 0.5 and place < len(content):
        content[place] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    return f"damaged {folder.name}/{path.name} at {place}"


def _check_telling(root: Path, bucket: FolderBucket | None, told: list[str]) -> None:
    try:
        check(root, bucket)
    except BaseException:
        print("; ".join(told), file=sys.stderr)
        raise


def main(histories: int, seed: int, folder: Path) -> None:
    manifests.place_of = lambda path: (
        FolderBucket(folder / "h" / "bucket") if str(path).startswith("gs:") else _place_of(path)
    )
    for number in range(histories):
        root = folder / "h"
        root.mkdir()
        rng = random.Random(f"{seed} {number}")
        try:
            told = history(root, rng)
        except BaseException:
            print(
                f"history {number} of seed {seed}:\n{(root / 'log').read_text()}", file=sys.stderr
            )
            raise
        if os.environ.get("TELL"):
            print(number, told, flush=True)
        shutil.rmtree(root)
    print(histories)


_place_of = manifests.place_of

if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
