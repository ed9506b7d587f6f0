"""Embeds an image and texts with an export, and compares them: python examples/embed.py EXPORT IMAGE TEXT..."""

import sys
from pathlib import Path

import torch

from mmmoe_pretrain.batch import Item, Sample, SampleMeta
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.export.read import load_export

if len(sys.argv) < 4:
    sys.exit(__doc__)
folder, image, *texts = sys.argv[1:]
model, config, modalities = load_export(Path(folder))
content = [("image", Path(image).read_bytes()), *(("text", text.encode()) for text in texts)]
values = [(name, modalities[name].decode(data)) for name, data in content]
items = [() if value is None else (Item(name, value),) for name, value in values]  # a blank text has no features
samples = [Sample(SampleMeta(str(number)), item) for number, item in enumerate(items)]
with torch.inference_mode():
    outputs, _ = model(pack(samples, PackSettings.from_config(config, modalities)))
image_P, texts_NP = outputs.features["image"][0], outputs.features["text"][1:]  # unit vectors of the joint space
for text, similarity in zip(texts, (texts_NP @ image_P).tolist(), strict=True):
    print(f"{similarity:+.4f}  {text}")
