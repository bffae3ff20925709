"""
The encoder half, from pixels to prefix, in ONNX Runtime against PyTorch.

    python benchmarks/onnx_encoder.py [--size tiny|mid] [--images 64] [--output FILE]

Both compute in float32, on the CPU and with as many threads, images one by one and 16 at once. What both make of the
same images must be equal to 1e-5.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import measure
import onnxruntime
import torch

from vlv.models.loading import load_captioner
from vlv.models.onnx_export import export_onnx

BATCHES = (1, 16)
EQUAL = 1e-5


def main() -> None:
    arguments = measure.parser(__doc__, default_images=64).parse_args()
    if arguments.size == "published":
        raise SystemExit("ONNX Runtime is measured on the CPU: choose --size tiny or mid.")
    with tempfile.TemporaryDirectory() as temporary:
        source = measure.checkpoint(arguments.size, Path(temporary) / "model")
        model, processor = load_captioner(source, "cpu", "float32")
        file = export_onnx(model, processor.image_height, processor.image_width, temporary)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        pixels = torch.randn(arguments.images, 3, processor.image_height, processor.image_width).clamp(-2, 2)

        @torch.no_grad()
        def torch_prefix(pixel_values: torch.Tensor) -> torch.Tensor:
            return model.prefix_projection(model.encode_context(model.encode(pixel_values)))

        def onnx_prefix(pixel_values: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(session.run(None, {"pixel_values": pixel_values.numpy()})[0])

        difference = max(float((torch_prefix(it) - onnx_prefix(it)).abs().max()) for it in pixels.split(BATCHES[-1]))
        if difference > EQUAL:
            raise SystemExit(f"The prefixes differ by {difference:.1e}, more than {EQUAL:.0e}.")

        def side(compute: Callable[[torch.Tensor], torch.Tensor], batch_size: int) -> Callable[[], float]:
            batches = pixels.split(batch_size)
            return lambda: measure.seconds_of(lambda: [compute(batch) for batch in batches]) / len(pixels)

        found = {}
        for batch_size in BATCHES:
            names = {f"PyTorch, batch {batch_size}": torch_prefix, f"ONNX Runtime, batch {batch_size}": onnx_prefix}
            seconds = measure.take_turns({name: side(compute, batch_size) for name, compute in names.items()})
            found |= measure.compare(seconds, next(iter(names)))
    print(f"largest difference {difference:.1e}")
    facts = {"images": arguments.images, "dtype": "float32", "difference": difference}
    facts["onnxruntime"] = onnxruntime.__version__
    measure.write(arguments.output, "onnx_encoder", arguments.size, found, **facts)


if __name__ == "__main__":
    main()
