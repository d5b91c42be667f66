"""How long does a whole image take: 20 steps of DPM++ 2M, guidance 7.5, at full size?

    python benchmarks/image.py [--size 256x256] [--rounds 2] [--steps 20] [--work FOLDER]
        [--engines reference,openvino-bf16] [--save]
    python benchmarks/image.py --xl --size 1024x1024 --rounds 1 --work FOLDER [--save]   # SDXL
    python benchmarks/image.py --exact [--engines 'fp32,openvino on cpu,static'] [--save]

Prompt to PNG, by the engine that `sdrt run` takes on a processor with bf16 and by the reference
library in fp32 and bf16, in turns of whole images: minutes a round. See latency.py for FOLDER.
"""

import json
import tempfile
from pathlib import Path

from latency import arguments, benched, kind_of_processor, said_of
from published import made_bundle
from results import save

SAMPLER = "DPM++ 2M"


def main() -> None:
    parser = arguments(__doc__, 2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--xl", action="store_true", help="SDXL")
    parser.add_argument("--exact", action="store_true", help="in float32, as without bf16")
    args = parser.parse_args()
    default = "reference,openvino on cpu" if args.exact else "reference,openvino-bf16"
    engines = args.engines or default
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        if args.xl:
            bundle = made_bundle(work, [args.size], "--fp16", xl=True)
        else:
            bundle = made_bundle(work, ["256x256", "512x512"])
        options = ["--size", args.size, "--rounds", str(args.rounds), "--engines", engines]
        # The first image only warms: one step is enough of it.
        options += ["--steps", f"1,{args.steps}", "--scheduler", SAMPLER]
        options += ["--exact"] if args.exact else []
        report = benched(bundle, *options, "--parts", "picture")
    part = f"picture, {args.steps} steps"
    model = "SDXL " if args.xl else ""
    what = "image in float32" if args.exact else "image"
    claims = {
        f"full-size {model}{what}, {args.size}, {args.steps} steps, {engine['name']}": "; ".join(
            [said_of(report, engine, part), shares_of(engine["parts"][part]["parts"])]
        )
        for engine in report["engines"]
    }
    print(json.dumps(claims, indent=2, ensure_ascii=False))
    if args.save:
        kind = kind_of_processor() + "_exact" * args.exact
        save(f"image_{'xl_' * args.xl}{args.size}{kind}", claims, report)


def shares_of(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())


if __name__ == "__main__":
    main()
