"""What one rank's run consists of, put together once, and the facts of it that a checkpoint keeps."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mmmoe_pretrain import __version__
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.cursor import Cursor
from mmmoe_pretrain.engines.base import Engine
from mmmoe_pretrain.modalities import Codecs
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.parallel.groups import Groups, HostGroups
from mmmoe_pretrain.train.journal import Journal
from mmmoe_pretrain.train.tally import Tally


@dataclass(frozen=True)
class Session:
    config: RunConfig
    layout: Layout
    groups: Groups
    host: HostGroups
    codecs: Codecs
    engine: Engine
    journal: Journal  # of rank 0; elsewhere it writes nothing
    main: bool  # is this rank 0?

    @property
    def counts_samples(self) -> bool:
        """Of the tensor and pipeline ranks that read the same samples, one counts them."""
        return self.groups.tensor_rank == 0 and self.groups.pipeline_rank == 0

    def meta(self, cursor: Cursor, samples: Tally, losses: dict[str, float]) -> dict[str, Any]:
        """Plain values saved beside the tensors of a checkpoint. Every random number of a run is a function of
        its seed, the step and the sample's position, so no generator's state is among them."""
        return {
            "version": __version__,
            "vocab_size": self.codecs.text.vocab_size,
            "tokenizer_fingerprint": self.codecs.text.fingerprint,
            "seed": self.config.seed,
            "progress": self.engine.progress().to_json(),
            "skipped_batches": cursor.to_json(),
            "samples": samples.to_json(),
            "losses": {name: value if math.isfinite(value) else None for name, value in losses.items()},
            "layout": dataclasses.asdict(self.layout),  # for information: any other may go on from here
            "config": self.config.model_dump(mode="json"),
        }
