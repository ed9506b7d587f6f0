"""How alike two runs divide the same tokens among their experts, whatever the experts' numbers: the adjusted mutual
information of the two experts of a token (Vinh, Epps and Bailey 2010), 1 for the same partition and about 0 for
independent ones of the same sizes, whatever their number of experts.

A token's expert is the most probable one that took it.

Shapes: n tokens, A and B experts of the two runs.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

from mmmoe_pretrain.checkpoint.model import SavedRun
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.evaluation import eval_settings
from mmmoe_pretrain.data.pack import origins, pack
from mmmoe_pretrain.evaluate.features import device_of
from mmmoe_pretrain.evaluate.routing.top_tokens import Decisions, watch
from mmmoe_pretrain.evaluate.rows import HeldOutRows
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.moe.tokens import token_info

ALIKE = ("modalities", "objectives", "representations")  # sections of a config that say which tokens there are


def check_same_tokens(own: SavedRun, other: SavedRun, name: str) -> None:
    """Raises ValueError where the two runs do not read the same tokens."""
    if other.config.moe.dense:
        raise ValueError(f"--beside {name} is a dense model: it has no experts to compare; give a run that has")
    for section in ALIKE:
        if getattr(_without_paths(own.config), section) != getattr(_without_paths(other.config), section):
            raise ValueError(
                f"--beside {name}: its {section} are not those of this run, so their tokens differ; give a run of "
                f"the same config with another seed"
            )
    if own.meta.get("tokenizer_fingerprint") != other.meta.get("tokenizer_fingerprint"):
        raise ValueError(
            f"--beside {name}: its tokenizer is not that of this run, so their tokens differ; give a run that was "
            f"trained with the same one"
        )


def _without_paths(config: RunConfig) -> RunConfig:
    """Each run reads its own copies of the files that its entries name; their fingerprints tell them apart."""
    return config.with_entries(
        {place: its.model_copy(update={its.file_setting: ""}) for place, its in config.files.items()}
    )


def compare(model: MMMoE, other: MMMoE, rows: HeldOutRows) -> dict[int, dict[str, float]]:
    """By layer that both have: the adjusted mutual information over the tokens of each modality."""
    tables: defaultdict[tuple[int, str], np.ndarray | int] = defaultdict(int)
    settings = eval_settings(rows.config, rows.modalities)
    with torch.inference_mode(), watch(model) as own_decisions, watch(other) as other_decisions:
        for samples, positions in rows.samples():
            batch = pack(samples, settings, positions)
            model(batch.to(device_of(model)))
            other(batch.to(device_of(other)))
            of_item_n = origins(samples, settings, positions).token_n >= 0
            tokens = token_info(batch, model.names)
            beside = {its.layer: its for its in other_decisions}
            for own in own_decisions:
                for m, name in enumerate(tokens.names.modalities if own.layer in beside else ()):
                    rows_n = of_item_n & (tokens.modality_ids_n.cpu().numpy() == m)
                    tables[own.layer, name] += _table(own, beside[own.layer], rows_n)
            own_decisions.clear()
            other_decisions.clear()
    found: defaultdict[int, dict[str, float]] = defaultdict(dict)
    for (layer, name), table_AB in tables.items():
        if isinstance(table_AB, np.ndarray) and table_AB.any():
            found[layer][name] = adjusted_mutual_information(table_AB)
    return dict(found)


def _table(own: Decisions, other: Decisions, rows_n: np.ndarray) -> np.ndarray:
    """[A, B]: how many of the tokens have each pair of experts."""
    table_AB = np.zeros((own.served_nE.shape[1], other.served_nE.shape[1]), dtype=np.int64)
    np.add.at(table_AB, (_expert(own)[rows_n], _expert(other)[rows_n]), 1)
    return table_AB


def _expert(decisions: Decisions) -> np.ndarray:
    return np.where(decisions.served_nE, decisions.log_p_nE, -np.inf).argmax(1)


def adjusted_mutual_information(table_AB: np.ndarray) -> float:
    """Over the mean of the two entropies; of two partitions into one part each 1."""
    table_AB = table_AB[np.ix_(table_AB.any(1), table_AB.any(0))].astype(np.int64)
    total, a_A, b_B = int(table_AB.sum()), table_AB.sum(1), table_AB.sum(0)
    if len(a_A) == len(b_B) == 1:
        return 1.0
    entropies = [-(its / total * np.log(its / total)).sum() for its in (a_A, b_B)]
    expected_AB = np.outer(a_A, b_B) / total
    there = table_AB > 0
    information = (table_AB[there] / total * np.log(table_AB[there] / expected_AB[there])).sum()
    chance = _expected_information(a_A, b_B, total)
    most = sum(entropies) / 2
    return float((information - chance) / (most - chance)) if most != chance else 0.0


def _expected_information(a_A: np.ndarray, b_B: np.ndarray, total: int) -> float:
    """Of random partitions of these sizes: each cell is hypergeometric."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])
    found = 0.0
    for a in a_A.tolist():
        for b in b_B.tolist():
            n = np.arange(max(1, a + b - total), min(a, b) + 1)
            log_p = (
                log_factorial[[a, b, total - a, total - b]].sum()
                - log_factorial[total] - log_factorial[n] - log_factorial[a - n] - log_factorial[b - n]
                - log_factorial[total - a - b + n]
            )  # fmt: skip
            found += float((np.exp(log_p) * n / total * np.log(total * n / (a * b))).sum())
    return found
