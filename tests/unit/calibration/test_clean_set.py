"""Clean sets in every container that is taken: the same images with the same labels come out, and oddities are forgiven aloud."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from PIL import Image, ImageEnhance

from calibration.clean_set import CleanSet, Limits, open_clean_set
from calibration.clean_set.duplicates import near_groups, thumbnail
from models.errors import CleanSetDegenerate, CleanSetFormat, CleanSetInvalid, CleanSetLabels, CleanSetSize

FEW = Limits(min_images=24)
Files = dict[str, bytes]

LOST = "Much of what the suspect takes for one of them will be rejected."


def pixels(seed: int, side: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def folders(count: int = 24, classes: tuple[str, ...] = ("cat", "dog", "eel"), below: str = "") -> Files:
    """An ImageFolder whose i-th image has pixels(i) and class i modulo the number of classes."""
    return {f"{below}{classes[i % len(classes)]}/{i:03}.png": png(pixels(i)) for i in range(count)}


def write_zip(path: Path, files: Files, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: Files, mode: str = "w", form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, mode, format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_folder(path: Path, files: Files) -> Path:
    for name, data in files.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return path


def write_parquet(path: Path, names: list[str] | None = None, labels: list[object] | None = None, count: int = 24) -> Path:
    rows = [{"bytes": png(pixels(i)), "path": f"{i}.png"} for i in range(count)]
    table = pa.table({"image": pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()})), "label": labels or [i % 3 for i in range(count)]})
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    if names is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=10)
    return path


def arrays(count: int = 24) -> dict[str, np.ndarray]:
    return {"images": np.stack([pixels(i) for i in range(count)]), "labels": np.arange(count, dtype=np.int64) % 3}


def with_metadata(kind: str) -> Files:
    files = {f"images/{i:03}.png": png(pixels(i)) for i in range(24)}
    if kind == "csv":
        text = "file_name,label\n" + "".join(f"images/{i:03}.png,{('cat', 'dog', 'eel')[i % 3]}\n" for i in range(24))
    else:
        text = "".join(json.dumps({"file_name": f"images/{i:03}.png", "label": i % 3}) + "\n" for i in range(24))
    return {**files, f"metadata.{kind}": text.encode()}


def webdataset(label: Callable[[int], tuple[str, str]]) -> Files:
    files = {}
    for i in range(24):
        suffix, text = label(i)
        files |= {f"{i:06}.png": png(pixels(i)), f"{i:06}.{suffix}": text.encode()}
    return files


def write_safetensors(path: Path) -> Path:
    safetensors.numpy.save_file(arrays(), path, {"format": "np"})
    return path


def write_npz(path: Path, save: Callable[..., None] = np.savez) -> Path:
    with path.open("wb") as file:
        save(file, **arrays())
    return path


CONTAINERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a stored zip": (lambda p: write_zip(p, folders()), "zip ImageFolder"),
    "a deflated zip": (lambda p: write_zip(p, folders(), zipfile.ZIP_DEFLATED), "zip ImageFolder"),
    "a pax tar": (lambda p: write_tar(p, folders(below="é" * 120 + "/")), "tar ImageFolder"),
    "a gnu tar with long names": (lambda p: write_tar(p, folders(below="w" * 120 + "/"), form=tarfile.GNU_FORMAT), "tar ImageFolder"),
    "a ustar tar with prefixes": (lambda p: write_tar(p, folders(below="w" * 95 + "/"), form=tarfile.USTAR_FORMAT), "tar ImageFolder"),
    "a tar.gz": (lambda p: write_tar(p, folders(), "w:gz"), "tar.gz ImageFolder"),
    "a folder": (lambda p: write_folder(p, folders()), "folder ImageFolder"),
    "a zip with metadata.csv": (lambda p: write_zip(p, with_metadata("csv")), "zip with metadata.csv"),
    "a folder with metadata.jsonl": (lambda p: write_folder(p, with_metadata("jsonl")), "folder with metadata.jsonl"),
    "a WebDataset of cls": (lambda p: write_tar(p, webdataset(lambda i: ("cls", str(i % 3)))), "tar WebDataset"),
    "a WebDataset of txt": (lambda p: write_tar(p, webdataset(lambda i: ("txt", f"class {i % 3}\n"))), "tar WebDataset"),
    "a WebDataset of json": (lambda p: write_tar(p, webdataset(lambda i: ("json", json.dumps({"label": i % 3})))), "tar WebDataset"),
    "parquet": (write_parquet, "parquet"),
    "parquet with class names": (lambda p: write_parquet(p, ["zebra", "ant", "cow"]), "parquet"),
    "safetensors": (write_safetensors, "safetensors"),
    "npz": (write_npz, "npz"),
    "compressed npz": (lambda p: write_npz(p, np.savez_compressed), "npz"),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_same_images_and_labels_come_out_of(container: str, tmp_path: Path) -> None:
    write, source = CONTAINERS[container]
    clean = open_clean_set(write(tmp_path / "upload"), FEW).labelled_by(3)
    assert (len(clean), clean.source, clean.warnings, len(clean.names)) == (24, source, (), 3)
    assert clean.labels.dtype == clean.groups.dtype == np.int64
    assert len(set(clean.groups)) == 24
    found = {clean.image(i).tobytes(): int(clean.labels[i]) for i in range(24)}
    assert found == {pixels(i).tobytes(): i % 3 for i in range(24)}
    assert [image.tobytes() for image in clean.images([5, 2])] == [clean.image(5).tobytes(), clean.image(2).tobytes()]


def test_wrapper_folders_and_litter_of_operating_systems_are_forgiven(tmp_path: Path) -> None:
    litter = {"data/train/cat/.DS_Store": b"x", "__MACOSX/data/train/cat/._000.png": b"x", "data/train/dog/Thumbs.db": b"x"}
    clean = open_clean_set(write_zip(tmp_path / "z", {**folders(below="data/train/"), **litter, "data/README.md": b"hello"}), FEW)
    assert clean.names == ("cat", "dog", "eel")
    assert clean.warnings == (
        "Left out 3 hidden or system files.",
        "Left out 1 file not belonging to a labelled image: 'data/README.md'.",
    )


def test_an_empty_class_folder_counts_as_a_class(tmp_path: Path) -> None:
    clean = open_clean_set(write_zip(tmp_path / "z", {"w/bee/": b"", **folders(below="w/")}), FEW).labelled_by(4)
    assert clean.names == ("bee", "cat", "dog", "eel")
    assert clean.labels.min() == 1
    assert f"1 of 4 classes have no images: 'bee'. {LOST}" in clean.warnings


def test_a_zip64_archive_written_to_a_stream_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in folders().items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
        archive.comment = b"a comment"
    assert len(open_clean_set(tmp_path / "z", FEW)) == 24


def test_a_gzip_of_several_members_is_read_to_its_end(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t", folders()).read_bytes()
    (tmp_path / "z").write_bytes(gzip.compress(tar[:5000]) + gzip.compress(tar[5000:]))
    assert len(open_clean_set(tmp_path / "z", FEW)) == 24


def test_two_splits_in_one_archive_are_refused_by_name(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "z", {**folders(below="train/"), **folders(below="val/")})
    with pytest.raises(CleanSetInvalid, match=r"several splits \('train', 'val'\)"):
        open_clean_set(path, FEW)


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    files = folders()
    for name, mode in zip(files, ("L", "RGBA"), strict=False):
        out = io.BytesIO()
        Image.open(io.BytesIO(files[name])).convert(mode).save(out, "PNG")
        files[name] = out.getvalue()
    clean = open_clean_set(write_zip(tmp_path / "z", files), FEW)
    assert {image.mode for image in clean.images()} == {"RGB"}


def test_threads_may_read_one_clean_set_together(tmp_path: Path) -> None:
    clean = open_clean_set(write_zip(tmp_path / "z", folders(60), zipfile.ZIP_DEFLATED), FEW)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: clean.image(i).tobytes(), list(range(60)) * 3))
    assert together == [image.tobytes() for image in clean.images()] * 3


# Labels


def clean_set(tmp_path: Path, classes: tuple[str, ...]) -> CleanSet:
    return open_clean_set(write_zip(tmp_path / "z", folders(classes=classes)), FEW)


def test_names_are_mapped_by_the_ordered_classes_of_the_suspect(tmp_path: Path) -> None:
    clean = clean_set(tmp_path, ("cat", "dog")).labelled_by(4, ["dog", "eel", "cat", "fox"])
    assert clean.names == ("dog", "eel", "cat", "fox")
    assert set(clean.labels) == {0, 2}
    assert clean.warnings == (f"2 of 4 classes have no images: 'eel', 'fox'. {LOST}",)


def test_names_unknown_to_the_suspect_are_listed_with_those_it_knows(tmp_path: Path) -> None:
    with pytest.raises(CleanSetLabels, match="no classes 'cat', which the clean set has; it knows 'dog', 'eel'"):
        clean_set(tmp_path, ("cat", "dog")).labelled_by(2, ["dog", "eel"])


def test_another_number_of_names_asks_for_classes(tmp_path: Path) -> None:
    with pytest.raises(CleanSetLabels, match="has 3 classes and the suspect 10; pass classes"):
        clean_set(tmp_path, ("cat", "dog", "eel")).labelled_by(10)


def test_classes_must_name_each_class_of_the_suspect_once(tmp_path: Path) -> None:
    clean = clean_set(tmp_path, ("cat", "dog"))
    for classes in (["cat"], ["cat", "cat"], ["cat", "dog", "eel"]):
        with pytest.raises(CleanSetLabels, match="suspect's 2 classes once"):
            clean.labelled_by(2, classes)


def test_integer_names_are_class_indices_and_sorted_as_numbers(tmp_path: Path) -> None:
    clean = clean_set(tmp_path, ("10", "9", "2"))
    assert clean.names == ("2", "9", "10")
    mapped = clean.labelled_by(12)
    assert set(mapped.labels) == {2, 9, 10}
    assert mapped.names == tuple(str(i) for i in range(12))
    assert any("sorted as text" in warning for warning in mapped.warnings)
    with pytest.raises(CleanSetLabels, match=r"has label 10, but .* are 0 to 9"):
        clean.labelled_by(10)


def test_integer_names_take_the_suspects_names_when_classes_are_passed(tmp_path: Path) -> None:
    mapped = clean_set(tmp_path, ("0", "1")).labelled_by(2, ["cat", "dog"])
    assert mapped.names == ("cat", "dog")
    assert set(mapped.labels) == {0, 1}


def test_one_number_written_in_two_ways_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CleanSetLabels, match="same number"):
        clean_set(tmp_path, ("1", "01")).labelled_by(3)


def test_class_names_declared_by_parquet_keep_their_order(tmp_path: Path) -> None:
    clean = open_clean_set(write_parquet(tmp_path / "p", ["zebra", "ant", "cow"]), FEW)
    assert clean.names == ("zebra", "ant", "cow")
    assert list(clean.labelled_by(3).labels[:3]) == [0, 1, 2]
    assert list(clean.labelled_by(3, ["ant", "cow", "zebra"]).labels[:3]) == [2, 0, 1]


def test_string_labels_in_parquet_are_class_names(tmp_path: Path) -> None:
    clean = open_clean_set(write_parquet(tmp_path / "p", labels=["b", "a"] * 12), FEW)
    assert clean.names == ("a", "b")
    assert list(clean.labels[:2]) == [1, 0]


def test_a_single_class_is_refused_and_a_dominant_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(CleanSetLabels, match="one class"):
        clean_set(tmp_path, ("cat",)).labelled_by(2, ["cat", "dog"])
    lopsided = open_clean_set(write_zip(tmp_path / "l", folders(classes=("a",) * 23 + ("b",))), FEW).labelled_by(2)
    assert lopsided.warnings == ("96% of the images belong to one class, 'a'.",)


# Sizes and duplicates


def test_the_number_of_images_must_lie_between_the_limits(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "z", folders(99))
    with pytest.raises(CleanSetSize, match="has 99 images; it needs at least 100"):
        open_clean_set(path)
    with pytest.raises(CleanSetSize, match="99 images; at most 98"):
        open_clean_set(path, Limits(images=98))
    assert len(open_clean_set(write_zip(tmp_path / "y", folders(100)))) == 100


def test_identical_images_are_degenerate(tmp_path: Path) -> None:
    files = {f"{c}/{i}.png": png(pixels(0)) for i in range(30) for c in "ab"}
    with pytest.raises(CleanSetDegenerate, match="Only 1 of 60 images"):
        open_clean_set(write_zip(tmp_path / "z", files), FEW)


def test_one_scene_a_class_repeated_with_noise_is_degenerate(tmp_path: Path) -> None:
    base = np.kron(pixels(0, 6), np.ones((4, 4, 1), np.uint8)) // 2 + 40
    files = {f"{'ab'[i % 2]}/{i}.png": png((base + pixels(i, 24) % 5).astype(np.uint8)) for i in range(30)}
    with pytest.raises(CleanSetDegenerate, match="only 2 different scenes"):
        open_clean_set(write_zip(tmp_path / "z", files), FEW)


def test_many_exact_duplicates_are_dropped_and_told(tmp_path: Path) -> None:
    copies = {f"cat/copy{i}.png": png(pixels(i)) for i in range(8)}
    clean = open_clean_set(write_zip(tmp_path / "z", {**folders(), **copies}), FEW)
    assert len(clean) == 24
    assert len({image.tobytes() for image in clean.images()}) == 24
    assert "8 of 32 images are exact duplicates and were left out." in clean.warnings
    assert "5 images appear again under another class." in clean.warnings


def test_few_exact_duplicates_stay_in_one_group(tmp_path: Path) -> None:
    clean = open_clean_set(write_zip(tmp_path / "z", {**folders(), "dog/copy.png": png(pixels(1))}), FEW)
    same = [i for i in range(25) if clean.image(i).tobytes() == pixels(1).tobytes()]
    assert len(clean) == 25
    assert len(same) == 2
    assert clean.groups[same[0]] == clean.groups[same[1]]
    assert len(set(clean.groups)) == 24


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Image.open(out).convert("RGB")


VARIANTS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "saved as JPEG": lambda image: jpeg(image, 80),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "brightened": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "of less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.7),
    "scaled down": lambda image: image.resize((40, 40), Image.Resampling.BILINEAR),
}


def scene(seed: int) -> Image.Image:
    """Smooth colour patches, as photographs have at this size."""
    return Image.fromarray(pixels(seed, 8) // 2 + 50).resize((64, 64), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_is_grouped_with_itself(variant: str) -> None:
    originals = [scene(seed) for seed in range(20)]
    groups = near_groups(np.stack([thumbnail(image) for image in [*originals, *map(VARIANTS[variant], originals)]]))
    assert list(groups) == [*range(20), *range(20)]


def test_different_scenes_and_flat_images_are_not_grouped() -> None:
    flat = [Image.fromarray(np.full((32, 32, 3), grey, np.uint8) + pixels(grey, 32) % 2) for grey in range(0, 250, 10)]
    images = [*(scene(seed) for seed in range(300)), *flat]
    assert len(set(near_groups(np.stack([thumbnail(image) for image in images])))) == len(images)


def test_groups_join_across_blocks_and_chains() -> None:
    many = np.stack([thumbnail(scene(seed)) for seed in range(300)])
    many[290], many[150], many[3] = many[7], many[7], many[7]
    groups = near_groups(many)
    assert {int(groups[i]) for i in (3, 7, 150, 290)} == {3}
    assert len(set(groups)) == 297


def test_parquet_without_pyarrow_says_which_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "p")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CleanSetFormat, match="needs the package pyarrow"):
        open_clean_set(path, FEW)
