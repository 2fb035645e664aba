"""`gse-jax prepare` and `convert`: downloaded files -> files that the other commands read."""

from pathlib import Path


def add_commands(commands) -> None:
    """Add `prepare` and `convert` to the parser.

    Args:
        commands: what `add_subparsers` returned.
    """
    prepare = commands.add_parser("prepare", help="write a data set's archive as an npz file")
    prepare.add_argument("dataset", choices=("cifar10", "cifar100"))
    prepare.add_argument("--archive", required=True,
                         help="cifar-10-binary.tar.gz or cifar-100-binary.tar.gz")
    prepare.add_argument("--split", default="test", choices=("test", "train"))
    prepare.add_argument("--out", help="npz file (default DATASET_SPLIT.npz)")
    prepare.set_defaults(run=_prepare)

    convert = commands.add_parser(
        "convert", help="write a PyTorch checkpoint as safetensors, without running its code")
    convert.add_argument("path", metavar="FILE", help="checkpoint of torch.save (.pth, .pt)")
    convert.add_argument("--out", required=True, help="safetensors file")
    convert.set_defaults(run=_convert)


def _prepare(args):
    from gse_jax import data

    out = Path(args.out or f"{args.dataset}_{args.split}.npz")
    count = data.prepare_cifar(args.dataset, args.archive, out, split=args.split)
    print(f"written: {out} ({count} images); use it as --data npz:{out}")


def _convert(args):
    from gse_jax import models

    count = models.convert(args.path, args.out)
    print(f"written: {args.out} ({count} tensors)")
