"""Where in a pickled object the weights are, and what their names are once the wrappers are gone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import Tensor

from models.checkpoint.limits import clean_name, listed
from models.checkpoint.torch_pickle import Dead, TensorRef
from models.errors import CheckpointInvalid

# Where training scripts keep the weights, in the order of preference: weights as trained before their moving average.
WEIGHT_KEYS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "net_state_dict", "network", "module", "weights", "params"),
    *("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "params_ema"),
)
NOT_WEIGHTS = ("optimizer", "optimizer_state_dict", "optimizer_states", "optim", "scheduler", "lr_scheduler", "scaler")
# Names that wrap a whole network; `_orig_mod` (torch.compile) is no name of a layer anywhere and goes wherever it stands.
WRAPPERS = ("module", "model", "_model", "net", "network", "backbone", "timm_model", "ema_model")
# What a trainer keeps beside a wrapped network.
COMPANY = ("n_averaged", "criterion", "loss", "loss_fn", "ema", "model_ema", "teacher", "metrics")


def is_rebuilt(value: object) -> bool:
    return isinstance(value, TensorRef) or (isinstance(value, Dead) and value.name.startswith("torch._utils._rebuild_"))


_Path = tuple[str, ...]


def locate(root: object) -> tuple[_Path, dict[str, object], list[str]] | None:
    """The path of the dict that holds the weights, that dict, and notes.

    The dict of the first usual name that holds more tensors than the top holds itself; where there is none, the largest.
    """
    found = {path: (node, count) for path, node in _dicts(root) if (count := sum(map(is_rebuilt, node.values())))}
    if not found:
        return None
    at_top = found.get((), ({}, 0))[1]
    usual = [path for path, (_, count) in found.items() if path and set(path) <= set(WEIGHT_KEYS) and count > at_top]
    chosen = min(usual, key=lambda path: [WEIGHT_KEYS.index(key) for key in path]) if usual else max(found, key=lambda path: found[path][1])
    notes = []
    if chosen:
        why = "" if usual else ", the largest dict of tensors, since none has a usual name"
        notes.append(f"The weights were taken from {clean_name('.'.join(chosen))}{why}.")
    if others := [".".join(path) or "(top)" for path in found if path != chosen]:
        notes.append(f"Other tensors were left aside, in: {listed(others)}.")
    return chosen, found[chosen][0], notes


def _dicts(root: object) -> Iterator[tuple[_Path, dict[str, object]]]:
    """The dicts at the top and at most two levels down, each once: linear however often they contain one another."""
    queue: list[tuple[_Path, dict[str, object]]] = [((), root)] if isinstance(root, dict) else []
    seen = {id(root)}
    for path, node in queue:
        yield path, node
        for key in (*WEIGHT_KEYS, *node) if len(path) < 2 else ():  # the usual names first, so that they name a dict that has two names
            if isinstance(value := node.get(key), dict) and id(value) not in seen and key not in NOT_WEIGHTS:
                seen.add(id(value))
                queue.append(((*path, key), value))


# Top modules by which pickles that attack do so. It is a list for a report: nothing at all is imported, in it or not.
_DANGEROUS = (
    "os",
    "posix",
    "nt",
    "subprocess",
    "sys",
    "socket",
    "shutil",
    "runpy",
    "importlib",
    "pty",
    "ctypes",
    "commands",
    "webbrowser",
    "code",
    "codeop",
    "operator",
    "pickle",
    "_pickle",
    "multiprocessing",
    "http",
    "urllib",
    "ftplib",
    "smtplib",
    "timeit",
    "pdb",
    "bdb",
    "cProfile",
    "profile",
    "trace",
    "tempfile",
    "pkgutil",
    "zipimport",
    "ensurepip",
    "pip",
    "pydoc",
    "doctest",
    "cffi",
    "httplib",
    "requests",
    "aiohttp",
)
# What pickles of honest objects name of the built-in module.
_PLAIN_BUILTINS = ("object", "set", "frozenset", "slice", "range", "complex", "bytearray", "list", "dict", "tuple", "int", "float", "bool", "str", "bytes")


def suspicious(names: Iterable[str]) -> tuple[str, ...]:
    """Of the modules and functions that a pickle asks for, those that start programs, open files or the like; cleaned."""
    return tuple(clean_name(name) for name in sorted(names) if _is_dangerous(*name.partition(".")[::2]))


def _is_dangerous(package: str, rest: str) -> bool:
    if package in ("builtins", "__builtin__"):
        return rest not in _PLAIN_BUILTINS
    return package in _DANGEROUS or rest.startswith(("hub.", "utils.cpp_extension.", "jit.", "package."))


def hints_of(root: dict[str, object]) -> dict[str, str | int]:
    """What BackdoorBench and the usual training scripts say of the model. Only a hint: nothing is believed that the tensors contradict."""
    hints: dict[str, str | int] = {}
    for key, name in (("arch", "model_name"), ("model_name", "model_name")):
        if isinstance(value := root.get(key), str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,60}", value):
            hints[name] = value
    for key in ("num_classes", "img_size"):
        value = root.get(key)
        if key == "img_size" and isinstance(value, (tuple, list)) and len(value) > 1 and value[0] == value[1]:
            value = value[0]  # (height, width, channels)
        if type(value) is int and 0 < value <= 100_000:
            hints[key] = value
    return hints


def strip(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Removes the names of wrappers around the network. They may nest; one number may be among them (Sequential(Resize, network))."""
    tensors = _without_company(tensors, notes)
    names, removed = unwrapped(list(tensors))
    if removed:
        notes.append(f"Wrapper prefixes were stripped from the names: {listed(removed)}.")
    if len(set(names)) != len(names):
        raise CheckpointInvalid("Two tensors have the same name once wrapper prefixes are stripped.")
    return dict(zip(names, tensors.values(), strict=True))


def unwrapped(full: list[str]) -> tuple[list[str], list[str]]:
    """Names of tensors without those of wrappers around the network, and the names that were removed."""
    names = [".".join(part for part in name.split(".") if part != "_orig_mod") for name in full]
    removed = ["_orig_mod"] if names != full else []
    while len(heads := {name.partition(".")[0] for name in names}) == 1 and all(rests := [name.partition(".")[2] for name in names]):
        (head,) = heads
        # A plain Sequential with weights in one layer ("1.weight", "1.bias") is left alone: a wrapped network has names of its own.
        number = head.isdecimal() and not any(part.isdecimal() for part in removed) and any("." in rest for rest in rests)
        if head not in WRAPPERS and not number:
            break
        names, removed = rests, [*removed, head]
    return names, removed


def _without_company(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Leaves out what a trainer keeps beside the wrapped network in one state dict: its moving average, class weights of a loss, counters."""
    heads = dict.fromkeys(name.partition(".")[0] for name in tensors)
    wrapped = next((wrapper for wrapper in WRAPPERS if wrapper in heads), None)
    if wrapped is None or len(heads) == 1 or any(head not in (*WRAPPERS, *COMPANY) for head in heads):
        return tensors
    notes.append(f"The network is {wrapped}; left out beside it: {listed([head for head in heads if head != wrapped])}.")
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"{wrapped}.")}
