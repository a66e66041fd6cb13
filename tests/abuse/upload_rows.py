"""Rows B1 to B22 and C1 to C14 of the catalogue of bad inputs as data: what is uploaded, and what must come of it.

`ROWS` go over HTTP and through the command line, those with `real` through a real child process; `VARIANTS` repeat rows with the hostile
files of the tests of the readers. `ELSEWHERE` says which test covers a row that is about the request and not about the file.
"""

from __future__ import annotations

import argparse
import gzip
import io
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from tests.abuse.hostile_checkpoints import ARCHIVES, B1, FLOATS, GADGETS, HEAVY, LIES, SAFETENSORS, Payload, described, framed, packed, patched, tensors_pickle
from tests.abuse.test_clean_set_abuse import BOMB, FOREIGN, link, npz, parquet, raw_tensors, symlink_in_zip, tarred, tensors, twice_in_zip, zipped
from tests.conftest import EXAMPLES
from tests.support import encode, network

Make = Callable[[Path], bytes]
Files = dict[str, bytes]


@dataclass(frozen=True)
class Row:
    """`make` gets a path where a file appears if anything in the upload runs. `detail` is a regular expression: found in the problem's detail,
    or in what `badexpert inspect` prints of what is taken. `job` is the code with which the job of an accepted upload fails; `also` are further
    codes that are right, too."""

    id: str
    what: str
    make: Make
    status: int
    code: str | None = None
    detail: str = ""
    real: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    also: tuple[tuple[int, str], ...] = ()
    job: str | None = None

    @property
    def name(self) -> str:
        return f"{self.id}: {self.what}"

    @property
    def is_checkpoint(self) -> bool:
        return self.id.startswith("B")

    @property
    def outcomes(self) -> set[tuple[int, str | None]]:
        return {(self.status, self.code), *self.also}


# ---- good files to spoil


@cache
def weights() -> dict[str, Tensor]:
    return safetensors.torch.load_file(EXAMPLES / "suspect_badnet.safetensors")


@cache
def images() -> Files:
    """120 of the example images, 12 of each class, in one folder a class."""
    with zipfile.ZipFile(EXAMPLES / "clean_set.zip") as archive:
        by_class: dict[str, list[str]] = {}
        for name in sorted(archive.namelist()):
            by_class.setdefault(name.partition("/")[0], []).append(name)
        return {name: archive.read(name) for names in by_class.values() for name in names[:12]}


def classes() -> list[str]:
    return sorted({name.partition("/")[0] for name in images()})


def pixels() -> np.ndarray:
    """uint8 [120, 32, 32, 3]."""
    return np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in images().values()])


def labels() -> np.ndarray:
    return np.array([classes().index(name.partition("/")[0]) for name in images()], np.int64)


def good_checkpoint() -> bytes:
    return (EXAMPLES / "suspect_badnet.safetensors").read_bytes()


def good_clean_set() -> bytes:
    return zipped(images(), zipfile.ZIP_STORED)


# ---- checkpoints


def saved(changed: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.contiguous().clone() for name, tensor in changed.items()})


def torch_saved(thing: object) -> bytes:
    torch.save(thing, buffer := io.BytesIO())
    return buffer.getvalue()


def with_weights(**changed: Callable[[Tensor], Tensor]) -> bytes:
    """The example suspect with some tensors changed; `__` stands for the dot in their names."""
    changes = {name.replace("__", "."): change for name, change in changed.items()}
    return saved({name: changes[name](tensor.clone()) if name in changes else tensor for name, tensor in weights().items()})


def each_float(change: Callable[[Tensor], Tensor]) -> bytes:
    return saved({name: change(tensor) if tensor.is_floating_point() else tensor for name, tensor in weights().items()})


def one(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def by_path(write: Callable[[Path], Any]) -> Make:
    """For writers that want a path."""

    def make(canary: Path) -> bytes:
        path = canary.with_name("written")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that torch has left behind
            write(path)
        data = path.read_bytes()
        path.unlink()
        return data

    return make


def always(make: Callable[[], bytes]) -> Make:
    return lambda _: make()


def metadata() -> bytes:
    """Valid, with very much markup and escape codes that nobody may repeat."""
    note = "<script>alert(1)</script>\x1b[2J\x07\u202e marker-of-row-b22 "
    return safetensors.torch.save(weights(), {"note": note * (600_000 // len(note))})


def long_header() -> bytes:
    return struct.pack("<Q", 101_000_000) + b"{" + b" " * 101_000_000


BAD = partial(Row, status=422, code="checkpoint_invalid")
TAKEN = partial(Row, status=202)
MISMATCH = partial(Row, status=422, code="checkpoint_mismatch")
CONVERT = "[Ll]oad it where it was made and save"
FORMAT = partial(Row, status=415, code="checkpoint_format", detail=CONVERT)

CHECKPOINT_ROWS = [
    FORMAT("B1", "TorchScript", by_path(B1["TorchScript"]), detail="", real=True),
    FORMAT("B1", "the old torch format", by_path(B1["old format"])),
    TAKEN(
        "B1a",
        "weights beside a payload",
        lambda canary: torch_saved({"state_dict": weights(), "args": Payload(canary)}),
        detail="names-code: .*not run",
        real=True,
    ),
    TAKEN(
        "B1a",
        "weights beside objects of foreign classes",
        lambda _: torch_saved({"model": weights(), "args": argparse.Namespace(lr=0.1), "rng": np.random.default_rng(0)}),
        detail="resnet20",
    ),
    FORMAT("B1a", "a payload alone in a torch zip", lambda canary: torch_saved(Payload(canary)), detail="whole pickled module"),
    FORMAT("B1a", "lists nested 100,000 deep", lambda _: packed(b"\x80\x02" + HEAVY["lists nested 100,000 deep"]), detail="not a state dict"),
    BAD(
        "B1a",
        "a tensor of 100,000x100,000 with stride 0",
        lambda _: packed(tensors_pickle(LIES["stride 0"]), {"0": FLOATS}),
        detail="",
        real=True,
    ),
    BAD("B1a", "a tensor past the end of its storage", lambda _: packed(tensors_pickle(LIES["far past the end"]), {"0": FLOATS})),
    BAD("B1a", "an entry twice", always(ARCHIVES["an entry twice"])),
    BAD(
        "B1a",
        "an entry that inflates a thousandfold",
        lambda _: packed(tensors_pickle(("0", 50_000_000, 0, (50_000_000,), (1,))), {"0": bytes(200_000_000)}, method=zipfile.ZIP_DEFLATED),
        detail="inflates",
        real=True,
    ),
    FORMAT("B2", "a pickle called safetensors", lambda canary: pickle.dumps(Payload(canary)), detail="bare pickle.*" + CONVERT, real=True),
    BAD("B3", "nothing", lambda _: b"", detail="empty or cut short", real=True),
    BAD("B3", "7 bytes", lambda _: b"\x02" + bytes(6), detail="empty or cut short"),
    BAD("B4", "a header of 2^63 bytes", lambda _: SAFETENSORS["B4 header of 2^63"], detail=""),
    BAD("B4", "a header of 101 MB that is there", lambda _: long_header(), real=True),
    BAD("B5", "a header of 100,000 nested lists", lambda _: SAFETENSORS["B5 100,000 lists deep"], real=True),
    BAD("B6", "tensors that overlap", lambda _: SAFETENSORS["B6 overlap"], real=True),
    BAD("B6", "a byte too few", lambda _: good_checkpoint()[:-1]),
    BAD("B6", "a zip archive behind the tensors", lambda _: good_checkpoint() + good_clean_set()),
    BAD("B7", "a shape whose product overflows", lambda _: SAFETENSORS["B7 product overflows to the right size"], real=True),
    BAD("B7", "an unknown dtype", lambda _: described(a=("F33", [2], [0, 8]))),
    BAD("B8", "100,000 empty tensors", lambda _: SAFETENSORS["B8 100,000 empty tensors"], real=True),
    MISMATCH("B9", "no tensors, safetensors", lambda _: framed(b"{}"), detail="holds no tensors", real=True),
    MISMATCH("B9", "no tensors, torch zip", lambda _: torch_saved({}), detail="holds no tensors"),
    MISMATCH(
        "B10",
        "8 keys missing",
        lambda _: saved(dict(list(weights().items())[:-8])),
        detail=r"fits no known architecture.*Closest: resnet20 .* is missing; and \d+ more",
        real=True,
    ),
    MISMATCH("B10", "a key too many", lambda _: saved({**weights(), "extra.weight": torch.ones(3)}), detail="extra.weight is unknown"),
    TAKEN("B10", "the prefix module.", lambda _: saved({f"module.{name}": tensor for name, tensor in weights().items()}), detail="stripped.*module"),
    MISMATCH(
        "B10", "another shape", lambda _: with_weights(conv1__weight=lambda tensor: torch.ones(16, 3, 5, 5)), detail="conv1.weight is 16x3x5x5, not 16x3x3x3"
    ),
    MISMATCH("B10", "a transposed head", lambda _: with_weights(linear__weight=lambda tensor: tensor.T), detail="linear.weight is 64x10, not classesx64"),
    TAKEN("B11", "float64", lambda _: each_float(Tensor.double), detail="float64", real=True),
    TAKEN("B11", "float16", lambda _: each_float(Tensor.half), detail="float16"),
    TAKEN("B11", "bfloat16", lambda _: each_float(Tensor.bfloat16), detail="bfloat16"),
    *(
        Row("B11", name, lambda _, dtype=dtype: each_float(lambda tensor: tensor.to(dtype)), 422, "checkpoint_dtype", f"type {name}")  # type: ignore[misc]
        for name, dtype in (("int8", torch.int8), ("complex64", torch.complex64), ("bool", torch.bool))
    ),
    Row("B12", "one NaN", lambda _: with_weights(conv1__weight=one(np.nan)), 422, "checkpoint_not_finite", "conv1.weight", real=True),
    Row("B12", "one infinity", lambda _: with_weights(linear__bias=one(np.inf)), 422, "checkpoint_not_finite", "linear.bias"),
    *(
        Row("B12", what, lambda _, change=change: each_float(change), 422, "checkpoint_degenerate", detail)  # type: ignore[misc]
        for what, change, detail in (
            ("all zeros", torch.zeros_like, "zero, or too small"),
            ("nothing but subnormal numbers", lambda tensor: torch.full_like(tensor, 1e-40), "zero, or too small"),
            ("weights of 1e38", lambda tensor: torch.full_like(tensor, 1e38), r"as large as 1e\+30"),
        )
    ),
    Row("B13", "a negative variance", lambda _: with_weights(bn1__running_var=one(-0.1)), 422, "checkpoint_degenerate", "bn1.running_var", real=True),
    Row("B13", "no variance", lambda _: with_weights(bn1__running_var=torch.zeros_like), 422, "checkpoint_degenerate", "bn1.running_var"),
    # The files are in order; what is wrong shows when the suspect sees the images.
    TAKEN(
        "B15",
        "a suspect that knows nothing",
        lambda _: saved(network(3).state_dict()),
        job="suspect_model_useless",
        detail="it is not trained",
        real=True,
    ),
    *(
        Row("B19", what, lambda _: good_checkpoint(), 422, "config_invalid", "architecture", config={"architecture": name})
        for what, name in (
            ("an unknown architecture", "resnet21"),
            ("an architecture with ../", "../../etc/passwd"),
            ("an architecture with %00", "resnet20%00"),
        )
    ),
    # Beyond the cap of every JSON body; the command line has no such cap, but the system has one for its arguments.
    Row("B19", "an architecture of 60 kB", lambda _: good_checkpoint(), 422, "config_invalid", "architecture", config={"architecture": "a" * 60_000}),
    MISMATCH(
        "B20", "num_classes that the head denies", lambda _: good_checkpoint(), detail="num_classes says 7 .*has 10", config={"num_classes": 7}, real=True
    ),
    TAKEN("B20", "num_classes that the head confirms", lambda _: good_checkpoint(), detail="resnet20", config={"num_classes": 10}),
    TAKEN("B22", "metadata of 600 kB with markup and escape codes", lambda _: metadata(), detail="resnet20", real=True),
]


# ---- clean sets


def shuffled() -> bytes:
    return tensors(pixels(), np.random.default_rng(0).permutation(labels()))


def fifty_thousand() -> bytes:
    """Noise of 8x8 pixels in ten classes."""
    return tensors(np.random.default_rng(0).integers(0, 256, (50_000, 8, 8, 3), dtype=np.uint8), np.arange(50_000) % 10)


def entries(count: int) -> bytes:
    """A zip of that many empty files: zipfile would take half a minute."""
    names = [b"cat/%06d" % i for i in range(count)]
    local = b"".join(struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, 0, 0, 0, len(name), 0) + name for name in names)
    central = b"".join(
        struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, len(name), 0, 0, 0, 0, 0, i * 40) + name for i, name in enumerate(names)
    )
    full = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(central), len(local))
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(local) + len(central), 1)
    return local + central + full + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)


def resized(width: int, height: int) -> bytes:
    return zipped({name: encode(Image.open(io.BytesIO(data)).resize((width, height)), "PNG") for name, data in images().items()})


def a_tenth_poisoned() -> bytes:
    """12 of the 120 images carry the example attack's trigger, under the labels of what they show."""
    with zipfile.ZipFile(EXAMPLES / "samples.zip") as archive:
        triggered = [name for name in sorted(archive.namelist()) if name.startswith("badnet/")][::8][:12]
        kept = {name: data for index, (name, data) in enumerate(images().items()) if index % 10}
        return zipped({**kept, **{name.removeprefix("badnet/"): archive.read(name) for name in triggered}})


def two_directories() -> bytes:
    """The zip64 end record says one entry less than the short one."""
    data = entries(120)
    data = patched(data, b"PK\5\6", 8, "<H", 120)
    return patched(patched(data, b"PK\6\6", 24, "<Q", 119), b"PK\6\6", 32, "<Q", 119)


def devices() -> bytes:
    return tarred(images(), link("airplane/l.png", tarfile.SYMTYPE), link("airplane/d.png", tarfile.CHRTYPE))


def encrypted() -> bytes:
    data = good_clean_set()
    return patched(data, b"PK\1\2", 8, "<H", 1, last=False)


def arrays(images: np.ndarray | None = None, labels_: np.ndarray | None = None) -> bytes:
    return tensors(pixels() if images is None else images, labels() if labels_ is None else labels_)


def few(count: int) -> bytes:
    return zipped(dict(list(images().items())[::-1][:count]))


def skewed() -> bytes:
    """99% of one class: 99 images of airplanes and one of a ship."""
    with zipfile.ZipFile(EXAMPLES / "clean_set.zip") as archive:
        names = sorted(archive.namelist())
        chosen = [name for name in names if name.startswith("airplane/")][:99] + [name for name in names if name.startswith("ship/")][:1]
        return zipped({name: archive.read(name) for name in chosen})


CLEAN_SET = partial(Row, status=422, code="clean_set_invalid")
SIZE = partial(Row, status=422, code="clean_set_size")
LABELS = partial(Row, status=422, code="clean_set_labels")
NAMED = {"classes": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]}

CLEAN_SET_ROWS = [
    Row("C1", "a pickle with a payload", lambda canary: pickle.dumps(Payload(canary)), 415, "clean_set_format", "Pickles are never loaded", real=True),
    *(Row("C1", what, lambda _, data=data: data, 415, "clean_set_format", advice) for what, (data, advice) in list(FOREIGN.items())),  # type: ignore[misc]
    Row("C1", "a real file of torch.save", lambda _: torch_saved({"images": torch.zeros(3)}), 415, "clean_set_format", "is a pickle"),
    CLEAN_SET("C1a", "a zip that climbs out", lambda _: zipped({"../../../canary": b"x", **images()}), detail="leads out of it", real=True),
    CLEAN_SET("C1a", "a zip with absolute names", lambda _: zipped({"/tmp/canary.png": b"x", **images()}), detail="absolute name"),
    CLEAN_SET("C1a", "a tar with links and devices", lambda _: devices(), detail="link, device or sparse"),
    CLEAN_SET("C1a", "a zip with a link", lambda _: symlink_in_zip(), detail="link or device"),
    CLEAN_SET("C1a", "a zip that inflates a thousandfold", lambda _: zipped({"cat/x.png": BOMB}), detail="inflates more than 100 times", real=True),
    CLEAN_SET("C1a", "a tar.gz that inflates a thousandfold", lambda _: gzip.compress(tarred({"cat/x.bin": bytes(80 << 20)}), 1), detail="more than 100 times"),
    CLEAN_SET("C1a", "200,001 entries", lambda _: entries(200_001), detail="more than 200,000 entries", real=True),
    CLEAN_SET("C1a", "a zip with two directories that disagree", lambda _: two_directories(), detail="zip64 directory is missing or another"),
    CLEAN_SET("C1a", "a name twice", lambda _: twice_in_zip(), detail="twice"),
    CLEAN_SET("C1a", "an encrypted zip", lambda _: encrypted(), detail="encrypted"),
    CLEAN_SET("C1a", "a zip in a zip", lambda _: zipped({**images(), "airplane/more.zip": good_clean_set()}), detail="other archives"),
    CLEAN_SET(
        "C1a",
        "a page called png",
        lambda _: zipped({**images(), "airplane/liar.png": b"<script>alert(1)</script>"}),
        detail="'airplane/liar.png' cannot be used",
    ),
    CLEAN_SET(
        "C2",
        "no class folders",
        lambda _: zipped({name.replace("/", "_"): data for name, data in images().items()}),
        detail="looked for one folder a class, or a metadata.csv",
        real=True,
    ),
    CLEAN_SET(
        "C2",
        "tensors without labels",
        lambda _: safetensors.torch.save({"images": torch.zeros(120, 8, 8, 3)}),
        detail="Looked for the arrays images and labels",
    ),
    CLEAN_SET("C2", "Parquet without images", lambda _: parquet(label=labels(), text=["x"] * 120), detail="Looked for one image column.*'label', 'text'"),
    CLEAN_SET("C3", "float images", lambda _: arrays(pixels().astype(np.float32)), detail=r"uint8 .*found float32 \[120, 32, 32, 3\]", real=True),
    CLEAN_SET("C3", "channels first", lambda _: arrays(pixels().transpose(0, 3, 1, 2).copy()), detail="put the channels last"),
    CLEAN_SET("C3", "one channel", lambda _: arrays(pixels()[..., :1].copy()), detail=r"found uint8 \[120, 32, 32, 1\]"),
    CLEAN_SET("C3", "four channels", lambda _: arrays(np.concatenate([pixels(), pixels()[..., :1]], 3)), detail=r"found uint8 \[120, 32, 32, 4\]"),
    CLEAN_SET("C3", "a side of 7", lambda _: arrays(pixels()[:, :7].copy()), detail="32x7; sides of 8 to 4096"),
    CLEAN_SET("C3", "a side of 5000", lambda _: arrays(np.zeros((120, 8, 5000, 3), np.uint8)), detail="5000x8"),
    SIZE("C4", "a label too few", lambda _: arrays(None, labels()[:-1]), detail="one integer for each of the 120 images"),
    SIZE("C4", "no images", lambda _: zipped({}), detail="needs at least 100"),
    SIZE("C4", "one image", lambda _: few(1), detail="1 images; it needs at least 100."),
    SIZE("C4", "99 images", lambda _: few(99), detail="99 images; it needs at least 100"),
    SIZE("C4", "50,001 images", lambda _: arrays(np.zeros((50_001, 8, 8, 3), np.uint8), np.zeros(50_001, np.int64)), detail="at most 50,000", real=True),
    LABELS("C5", "a negative label", lambda _: arrays(None, labels() - 1), detail="from 0 on; found -1 to 8"),
    LABELS("C5", "a label beyond the classes", lambda _: arrays(None, labels() + 1), detail="label 10, but the suspect's 10 classes are 0 to 9", real=True),
    LABELS("C5", "float labels", lambda _: arrays(None, labels().astype(np.float64)), detail="must be integers; found float64"),
    LABELS("C5", "labels above 2^63", lambda _: npz(images=pixels(), labels=labels().astype(np.uint64) + np.uint64(2**63)), detail="from 0 on"),
    TAKEN(
        "C6",
        "a class absent",
        lambda _: zipped({name: data for name, data in images().items() if not name.startswith("truck/")}),
        detail="1 of 10 classes have no images: 'truck'",
        config=NAMED,
        real=True,
    ),
    LABELS(
        "C6",
        "one class only",
        lambda _: zipped({f"cat/{name.replace('/', '_')}": data for name, data in images().items()}),
        config=NAMED,
        detail="belong to one class",
    ),
    TAKEN("C6", "99% of one class", lambda _: skewed(), detail="99% of the images belong to one class, 'airplane'", config=NAMED),
    Row(
        "C7",
        "one image 120 times",
        lambda _: arrays(np.repeat(pixels()[:1], 120, 0)),
        422,
        "clean_set_degenerate",
        "Only 1 of 120 images differ",
        real=True,
    ),
    TAKEN(
        "C7",
        "a tenth of it duplicates",
        lambda _: zipped({**images(), **{f"{name[:-4]}-again.png": data for name, data in list(images().items())[::9]}}),
        detail="14 of 134 images are exact duplicates and were left out",
    ),
    TAKEN("C8", "shuffled labels", lambda _: shuffled(), job="clean_set_mislabelled", detail="the labels are mixed up", real=True),
    TAKEN("C9", "a tenth of it poisoned", lambda _: a_tenth_poisoned(), detail="contamination: .* triggers in the clean set would show so", real=True),
    CLEAN_SET("C10", "nothing", lambda _: b"", detail="empty or truncated"),
    CLEAN_SET("C10", "7 bytes", lambda _: b"\x02" + bytes(6), detail="empty or truncated"),
    CLEAN_SET("C10", "a header of 2^63 bytes", lambda _: (1 << 63).to_bytes(8, "little") + b"{}" + bytes(100), detail="header is longer", real=True),
    CLEAN_SET("C10", "a header of 100,000 nested objects", lambda _: raw_tensors(b'{"a":' * 100_000), detail="not JSON"),
    CLEAN_SET("C10", "a key twice", lambda _: raw_tensors(b'{"a": 1, "a": 2}'), detail="not JSON"),
    CLEAN_SET(
        "C10",
        "tensors that overlap",
        lambda _: raw_tensors({name: {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]} for name in ("images", "labels")}, bytes(8)),
        detail="overlap or leave a gap",
    ),
    CLEAN_SET("C10", "a byte too few", lambda _: arrays()[:-1], detail="shorter or longer"),
    CLEAN_SET("C10", "a zip behind the tensors", lambda _: arrays() + good_clean_set(), detail="shorter or longer"),
    CLEAN_SET(
        "C10",
        "a shape whose product overflows",
        lambda _: raw_tensors({"images": {"dtype": "U8", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}}, bytes(8)),
        detail="not described",
    ),
    CLEAN_SET("C10", "100,000 empty tensors", lambda _: SAFETENSORS["B8 100,000 empty tensors"], detail="longer than 1 MiB"),
    # The preprocessing is searched for, so that images of any size are resized to the network's: nothing to refuse.
    TAKEN("C13", "images of another size", lambda _: resized(48, 40), detail="resize|32", real=True),
    TAKEN("C14", "50,000 images", lambda _: fifty_thousand(), real=True),
]

ROWS = [*CHECKPOINT_ROWS, *CLEAN_SET_ROWS]


# ---- the files of the tests of the readers


def _number(name: str) -> tuple[str, str]:
    number, _, what = name.partition(" ")
    return number, what


EITHER = (415, "checkpoint_format"), (422, "checkpoint_mismatch")
VARIANTS = [
    *(FORMAT("B1", name, by_path(write), also=((422, "checkpoint_invalid"),)) for name, write in B1.items()),
    *(FORMAT("B1a", name, lambda _, data=data: packed(data.replace(b"{}", b">can;")), detail="") for name, data in GADGETS.items()),  # type: ignore[misc]
    *(BAD("B1a", name, lambda _, data=data: packed(b"\x80\x02" + data), also=EITHER) for name, data in HEAVY.items()),  # type: ignore[misc]
    *(BAD("B1a", name, lambda _, claim=claim: packed(tensors_pickle(claim), {"0": FLOATS})) for name, claim in LIES.items()),  # type: ignore[misc]
    *(BAD("B1a", name, always(make)) for name, make in ARCHIVES.items()),
    *(BAD(*_number(name), lambda _, data=data: data) for name, data in SAFETENSORS.items()),  # type: ignore[misc]
]

SERVER = "tests/integration/test_server.py"
UPLOADS = "tests/abuse/test_upload_rows.py"
ELSEWHERE = {
    "B14": f"{UPLOADS}::test_b14",
    "B16": f"{UPLOADS}::test_b16_c11",
    "B17": f"{UPLOADS}::test_b17",
    "B18": f"{UPLOADS}::test_b18",
    "B21": f"{SERVER}::test_the_same_idempotency_key_gives_the_same_job",
    "C11": f"{UPLOADS}::test_b16_c11",
    "C12": f"{UPLOADS}::test_c12",
}
