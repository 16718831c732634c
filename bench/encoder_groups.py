"""How many pictures go through the encoder together on a CPU: `python -m bench.encoder_groups [--config base] ...`.

Seconds to encode 8 pictures in fp32 with random weights, at some sizes of what a group's widest activations may
take a thread; the sizes take turns. Writes bench/results/encoder_groups.json.
"""

import argparse
from typing import Any

import torch

from bench import report
from bench.generation import FOLDERS
from bench.packed_linear import median_ms
from trocr_fast import encoder
from trocr_fast.config import CheckpointConfig
from trocr_fast.weights import expected_shapes

PICTURES = 8
MEGABYTES = (1, 4, 8, 12, 16, 512)  # a thread
TURNS = 5


def random_encoder(config: CheckpointConfig) -> encoder.Encoder:
    """An encoder of this configuration; its speed does not depend on its weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for name, shape in expected_shapes(config).items() if name.startswith("encoder.")}
    weights = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return encoder.Encoder(config.encoder, weights)


@torch.inference_mode()
def measure(name: str) -> list[dict[str, Any]]:
    config = CheckpointConfig.from_folder(FOLDERS[name])
    model = random_encoder(config)
    pixels = torch.randn(PICTURES, config.encoder.num_channels, *config.encoder.image_size)
    sizes = {}

    def encode(megabytes: int) -> torch.Tensor:
        encoder.CACHED_BYTES = megabytes << 20
        return model(pixels)

    for megabytes in MEGABYTES:
        encoder.CACHED_BYTES = megabytes << 20
        num_groups = -(-PICTURES // model.most_at_once(PICTURES))
        sizes[megabytes] = -(-PICTURES // num_groups)  # of the largest
    forms = {str(megabytes): lambda megabytes=megabytes: encode(megabytes) for megabytes in MEGABYTES}
    found = median_ms(forms, TURNS)
    return [
        {
            "configuration": name,
            "megabytes_a_thread": megabytes,
            "pictures_at_once": sizes[megabytes],
            "ms": found[str(megabytes)],
        }
        for megabytes in MEGABYTES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", choices=FOLDERS, default=list(FOLDERS))
    rows = []
    print(f"{'configuration':<15}{'MB a thread':>12}{'at once':>9}{'ms':>9}")
    for name in parser.parse_args().config:
        for row in measure(name):
            rows.append(row)
            print(f"{name:<15}{row['megabytes_a_thread']:>12}{row['pictures_at_once']:>9}{row['ms']:>9.0f}", flush=True)
    print(f"written to {report.write('encoder_groups', rows).relative_to(report.ROOT)}")


if __name__ == "__main__":
    main()
