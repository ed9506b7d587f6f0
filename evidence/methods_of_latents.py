"""The studies of docs/methods.md of generation from latent numbers: emoji and their names, and stamps that are
heard."""

from __future__ import annotations

from evidence.study import TEST, Method, Metric, Study, Variant

BOUND = Metric(f"{TEST}latent_importance", "bound of log p, nats", False, compared=False)
IMAGE_GIVEN_NAME = (
    Metric(f"{TEST}latent_image_given_text_to_image_r10", "image from its name, recall@10", False, percent=True),
    Metric(f"{TEST}latent_image_given_text", "log p(image given name), nats", False, compared=False),
)
NAME_GIVEN_IMAGE = (
    Metric(f"{TEST}latent_text_given_image_to_text_r10", "name from its image, recall@10", False, percent=True),
    Metric(f"{TEST}latent_text_given_image", "log p(name given image), nats", False, compared=False),
)
JUDGED = (
    "What is generated goes through the run's own trunk, and its vector is to find the true item among those of 512 "
    "held-out samples; so the judge differs from run to run. Likelihoods and bounds are of 8 draws, sums over an "
    "item. Scores are of `mmmoe evaluate`."
)
LATENTS = (
    Study(
        name="latents",
        title="Emoji and their names, generated from each other",
        question="Which posterior of two modalities generates one from the other?",
        config="configs/methods/mvae.yaml",
        corpus="europe",
        metrics=(*IMAGE_GIVEN_NAME, *NAME_GIVEN_IMAGE, BOUND),
        reference="mvae",
        variants=(
            Method("mvae", "product of experts", item="generative", paper="MVAE, arXiv 1802.05335"),
            Method("mmvae", "mixture of experts", item="generative", paper="MMVAE, arXiv 1911.03393"),
            Method("mopoe", "mixture of products", item="generative", paper="MoPoE, arXiv 2105.02470"),
            Method("private_latents", "product, private latents", item="generative", paper="DMVAE, arXiv 2012.13024"),
            Method("total_correlation", "product, total correlation", item="generative", paper="arXiv 1802.04942"),
        ),
        panels=(),
        setting=f"The reference is the product of experts. {JUDGED}",
        evaluated=True,
    ),
    Study(
        name="told",
        title="Emoji, generated from their names",
        question="Does it help to tell the decoder the name, instead of inferring latent numbers from it?",
        config="configs/methods/mvae.yaml",
        corpus="europe",
        metrics=IMAGE_GIVEN_NAME,
        reference="mvae",
        variants=(
            Variant("mvae", "product of experts", same_as="latents/mvae"),
            Method("conditional_vae", "conditional", item="generative", paper="Sohn et al., NIPS 2015"),
        ),
        panels=(),
        setting="Latent numbers are drawn from the prior that the name gives, or from the posterior of the name. "
        f"{JUDGED}",
        evaluated=True,
    ),
    Study(
        name="spoken_latents",
        title="Stamps, their names and recordings, generated from each other",
        question="Of three modalities, which posterior generates one from another?",
        config="configs/methods/spoken_latents.yaml",
        corpus="demo",
        metrics=(
            IMAGE_GIVEN_NAME[0],
            Metric(
                f"{TEST}latent_audio_given_image_to_audio_r10",
                "recording from its image, recall@10",
                False,
                percent=True,
            ),
            BOUND,
        ),
        reference="product",
        variants=(
            Variant("product", "product of experts", ("objectives.latent.joint=product",)),
            Method("spoken_latents", "mixture of products", item="generative", paper="MoPoE, arXiv 2105.02470"),
        ),
        panels=(),
        setting=JUDGED,
        evaluated=True,
    ),
)
