"""Embeds an image and texts with an export, and compares them: python examples/embed.py EXPORT IMAGE TEXT..."""

import sys
from pathlib import Path

import torch

from mmmoe_pretrain.batch import Sample, SampleMeta
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.export.read import load_export

folder, image, *texts = sys.argv[1:]
model, config, codecs = load_export(Path(folder))
samples = [Sample(SampleMeta(image), image=codecs.image.decode(Path(image).read_bytes()))]
samples += [Sample(SampleMeta(text), text=codecs.text.encode(text)) for text in texts]
with torch.inference_mode():
    features = model(pack(samples, PackSettings.from_config(config, codecs))).features
image_P, texts_NP = features["image"][0], features["text"][1:]  # unit vectors of the joint space
for text, similarity in zip(texts, (texts_NP @ image_P).tolist(), strict=True):
    print(f"{similarity:+.4f}  {text}")
