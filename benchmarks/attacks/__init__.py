"""Published backdoor attacks, one file each, behind one interface. All triggers are drawn or learned here."""

from __future__ import annotations

from benchmarks.attacks.adap_blend import AdapBlend
from benchmarks.attacks.adap_patch import AdapPatch
from benchmarks.attacks.all_to_all import AllToAll
from benchmarks.attacks.badnet import BadNet
from benchmarks.attacks.blend import Blend
from benchmarks.attacks.bpp import Bpp
from benchmarks.attacks.clean_label import CleanLabel
from benchmarks.attacks.dynamic import Dynamic
from benchmarks.attacks.finetune import Finetuned
from benchmarks.attacks.ftrojan import FTrojan
from benchmarks.attacks.interface import Attack, Batch, Recipe, Surrogate, Task, draw, plant, stamp
from benchmarks.attacks.issba import Issba
from benchmarks.attacks.sig import Sig
from benchmarks.attacks.sra import SubnetReplacement
from benchmarks.attacks.tact import TaCT
from benchmarks.attacks.trojan_patch import TrojanPatch
from benchmarks.attacks.trojannn import TrojanNN
from benchmarks.attacks.wanet import WaNet

ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack
    for attack in (
        *(BadNet, Blend, TrojanPatch, CleanLabel, Sig, Dynamic, Issba, WaNet, Bpp, FTrojan, Finetuned, TrojanNN, SubnetReplacement, TaCT),
        *(AdapBlend, AdapPatch, AllToAll),
    )
}
"""In the order in which the results tables show them."""

__all__ = ["ATTACKS", "Attack", "Batch", "Recipe", "Surrogate", "Task", "draw", "plant", "stamp"]
