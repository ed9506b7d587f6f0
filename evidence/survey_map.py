"""The map at the end of docs/methods.md: the headings of the surveys of multimodal learning, what serves each here,
and what was measured.

The surveys: multimodal machine learning (Baltrusaitis et al., arXiv 1705.09406), missing modalities (Wu et al., arXiv
2409.07825), and mixtures of experts for multimodal models, whose headings are those of the last two groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evidence import page, records
from evidence.study import CONFIGS, Study, find

TITLES = ("heading", "here", "configs", "measured")
NOT_RUN = "not run yet"


@dataclass(frozen=True)
class Heading:
    """``files``: from the root of the repository. ``runs``: STUDY/VARIANT, whose change from the study's reference by
    its first compared metric is shown. ``missing``: what stands there without any."""

    group: str
    name: str
    files: tuple[str, ...]
    runs: tuple[str, ...] = ()
    missing: str = ""


OBJECTIVES, FUSION, MOE = "mmmoe_pretrain/objectives", "mmmoe_pretrain/models/fusion", "mmmoe_pretrain/moe"
HEADINGS = (
    Heading("Representation", "joint", (f"{FUSION}/early.py",), ("fusion/fusion_early",)),
    Heading("Representation", "of latent variables", (f"{OBJECTIVES}/multimodal_vae.py",),
            ("latents/mvae", "latents/mmvae", "latents/mopoe", "latents/private_latents",
             "latents/total_correlation", "told/conditional_vae", "spoken_latents/spoken_latents")),
    Heading("Representation", "coordinated", (f"{OBJECTIVES}/contrastive.py", f"{OBJECTIVES}/sigmoid_contrastive.py",
                                              f"{OBJECTIVES}/deep_cca.py", f"{OBJECTIVES}/deep_gcca.py"),
            ("europe/sigmoid_contrastive", "europe/deep_cca", "stamps/deep_gcca", "heads/aligned")),
    Heading("Representation", "self-supervised", (f"{OBJECTIVES}/masked.py", f"{OBJECTIVES}/self_distillation.py",
                                                  f"{FUSION}/view.py"),
            ("europe/masked", "europe/masked_autoencoder", "europe/masked_joint", "europe/self_distillation",
             "europe/pretext_invariant")),
    Heading("Translation", "into text", (f"{OBJECTIVES}/next_token.py", "mmmoe_pretrain/generate/tasks.py"),
            ("recognition/speech_to_text", "captioning/stamp_captions")),
    Heading("Translation", "into images and speech", ("mmmoe_pretrain/modalities/image_codes.py",
                                                      "mmmoe_pretrain/modalities/audio_codes.py"),
            ("drawing/text_to_image", "speaking/image_to_speech")),
    Heading("Alignment", "instances across and within modalities", (f"{OBJECTIVES}/pairs.py",),
            ("stamps/instance_discrimination", "europe/memory_queue", "europe/momentum_queue")),
    Heading("Alignment", "domains", (f"{OBJECTIVES}/moment_alignment.py", f"{OBJECTIVES}/domain_adversarial.py"),
            ("domains/moment_alignment", "domains/domain_adversarial")),
    Heading("Fusion", "late, gated, of products", (f"{FUSION}/late.py", f"{FUSION}/gated.py", f"{FUSION}/tensor.py",
                                                   f"{FUSION}/low_rank.py"),
            ("fusion/fusion_late", "fusion/fusion_gated", "fusion/fusion_tensor", "fusion/fusion_low_rank")),
    Heading("Fusion", "by attention", (f"{FUSION}/latents.py", f"{FUSION}/mult.py", f"{FUSION}/bottleneck.py"),
            ("fusion/fusion_latents", "fusion/fusion_mult", "fusion/fusion_bottleneck")),
    Heading("Fusion", "by graphs", (f"{FUSION}/graph.py",), ("fusion/fusion_graph",)),
    Heading("Fusion", "balance of modalities", (f"{FUSION}/modulation.py", f"{OBJECTIVES}/token_groups.py",
                                                f"{OBJECTIVES}/uncertainty.py"),
            ("modulation/ogm_ge", "languages/balanced_tokens", "languages/sampling_temperature",
             "weighting/uncertainty_weighting", "budgets/expert_budgets")),
    Heading("Co-learning", "zero-shot, unseen classes and pairs", (f"{OBJECTIVES}/semantic_anchors.py",),
            ("unseen/unseen_anchors", "europe/semantic_anchors", "unpaired/unpaired")),
    Heading("Co-learning", "a rich modality helps a poor one", ("evidence/methods_of_stamps.py",),
            ("co_learning/co_learning",)),
    Heading("Missing modalities", "imputation", ("mmmoe_pretrain/evaluate/imputation.py",
                                                f"{OBJECTIVES}/completion.py"),
            ("unheard/neighbours", "unheard/completion", "unheard/completion_mixture", "unheard/hallucination")),
    Heading("Missing modalities", "representations that allow any subset", (f"{FUSION}/base.py",
                                                                            f"{OBJECTIVES}/multimodal_vae.py"),
            ("missing/dropout_60",)),
    Heading("Missing modalities", "architectures", (f"{FUSION}/bank.py", f"{MOE}/losses.py"),
            ("missing/missing_bank", "combinations/combination_routing")),
    Heading("Experts as", "an efficient engine", (f"{MOE}/layer.py", f"{MOE}/dispatch.py"),
            ("captions/e16", "retrieval/e16", "prose/e16")),
    Heading("Experts as", "a learner of representations", (f"{MOE}/routing.py",),
            ("limoe/global", "routers/modalities")),
    Heading("Experts as", "adapters", ("mmmoe_pretrain/surgery/add.py", "mmmoe_pretrain/surgery/extend.py"),
            ("lifelong/experts",)),
    Heading("Research on experts", "interpretable routing", ("mmmoe_pretrain/evaluate/routing/ablation.py",
                                                             "mmmoe_pretrain/evaluate/routing/sample_shares.py",
                                                             "mmmoe_pretrain/evaluate/routing/stability.py")),
    Heading("Research on experts", "expert communication", (f"{MOE}/expert_attention.py", f"{MOE}/routing_memory.py"),
            ("communication/expert_attention", "communication/routing_memory")),
    Heading("Research on experts", "modality integration", ("mmmoe_pretrain/engines/task_gradients.py",
                                                            f"{OBJECTIVES}/classify.py"),
            ("tasks/task_routing", "tasks/pcgrad", "tasks/own_heads", "tasks/entering_tasks")),
    Heading("Research on experts", "lifelong learning", ("mmmoe_pretrain/engines/hold.py",
                                                         f"{OBJECTIVES}/distillation.py"),
            ("lifelong/replay", "lifelong/ewc", "lifelong/distillation")),
    Heading("Applications", "medical images with missing views", ("examples/medical/README.md",),
            missing="on that page, of synthetic phantoms"),
    Heading("Applications", "dialogue, social media", (), missing="not built yet"),
)  # fmt: skip


def section(studies: tuple[Study, ...], folder: Path) -> str:
    """The last section of the page, of records in ``folder``."""
    rows = [TITLES, *(_row(heading, studies, folder) for heading in HEADINGS)]
    lines = ["## The surveys' headings", "What serves each heading, and the change that it made here.", ""]
    return "\n".join([*lines, *page.table(rows)]) + "\n"


def _row(heading: Heading, studies: tuple[Study, ...], folder: Path) -> tuple[str, ...]:
    files = ", ".join(f"[`{Path(file).name}`](../{file})" for file in heading.files)
    found = [_measured(run, studies, folder) for run in heading.runs]
    measured = "; ".join(found) or heading.missing or "-"
    return f"{heading.group}: {heading.name}", files or "-", ", ".join(_configs(heading, studies)) or "-", measured


def _configs(heading: Heading, studies: tuple[Study, ...]) -> Iterator[str]:
    """Of methods; other variants are overrides of their study's config."""
    for study, name in map(_parts, heading.runs):
        config = find(study, studies).variant(name).config
        if config.startswith(CONFIGS):
            yield f"[`{Path(config).name}`](../{config})"


def _parts(run: str) -> tuple[str, str]:
    study, _, variant = run.partition("/")
    return study, variant


def _measured(run: str, studies: tuple[Study, ...], folder: Path) -> str:
    name, variant = _parts(run)
    study = find(name, studies)
    its, runs = study.variant(variant), records.read_study(study, folder)
    metric = next(metric for metric in study.metrics if metric.compared)
    if variant not in runs or study.reference not in runs:
        return f"{its.label}: {NOT_RUN}"
    return f"{its.label}: {page.change(study, runs, its, metric)} ({metric.title})"
