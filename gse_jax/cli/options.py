"""Options that several commands share, and how their texts become values."""

import warnings
from pathlib import Path

DATA = ("digits, npz:FILE (x uint8 or in [0, 1], y), cifar10:ARCHIVE, cifar100:ARCHIVE, "
        "folder:PATH, nips2017:FOLDER or tfds:NAME:SPLIT; the last three with ,size=224 and ,resize=crop")


def add_model(parser, *, required, hint=" (default: what the run says)"):
    """Add --model, --weights and --normalize to a command."""
    hint = "" if required else hint
    parser.add_argument("--model", required=required,
                        help="resnet20, 32, 44, 56 or wide_resnet28_10 (CIFAR); resnet18, 50, "
                             f"vgg19 or vit_b_16 (ImageNet){hint}")
    parser.add_argument("--weights", required=required,
                        help="safetensors or npz in PyTorch layout, hf:OWNER/REPO@REVISION, or "
                             f"digits{hint}")
    parser.add_argument("--normalize", default="half" if required else None,
                        metavar="half|imagenet|none|MEAN/STD",
                        help="what the model does to images in [0, 1]; three numbers each may be "
                             f"given as 0.49,0.48,0.45/0.25,0.24,0.26{hint or ' (default half)'}")


def add_job(parser, *, out):
    """Add what to work on, with how many lanes and where results go, to a command that attacks at once."""
    parser.add_argument("--data", required=True, help=DATA)
    add_model(parser, required=True)
    parser.add_argument("--limit", type=int, help="take the first N images only")
    parser.add_argument("--lanes", type=int, help="images worked on at a time")
    parser.add_argument("--seed", type=int, default=0, help="for attacks with randomness")
    parser.add_argument("--out", default=out, help=f"folder (default {out})")


def load_job(args):
    """Return (images, apply_fn, params, about): the last is what a stored run says of the others."""
    from gse_jax import data, models

    require_positive("--limit", args.limit)
    images = data.load(args.data, limit=args.limit)
    about = {"data": args.data, "model": args.model, "weights": str(args.weights),
             "normalize": args.normalize, "class_names": list(images.class_names)}
    return images, *models.load(args.model, weights=args.weights,
                                normalize=normalization(args.normalize)), about


def normalization(text):
    """Turn `half`, `imagenet`, `none` or MEAN/STD into (mean, std)."""
    from gse_jax.models import NORMALIZATIONS

    if text in NORMALIZATIONS:
        return NORMALIZATIONS[text]
    try:
        mean, std = ([float(v) for v in part.split(",")] for part in text.split("/"))
    except ValueError:
        raise ValueError(f"--normalize {text!r} is unknown; use {', '.join(NORMALIZATIONS)} or "
                         "MEAN/STD such as 0.5/0.5") from None
    return mean, std


def targets(text, y, num_classes):
    """Turn `next` or a file with one class a line into targets; None for an untargeted attack."""
    from gse_jax.evaluation import next_class

    if text is None or text == "next":
        return None if text is None else next_class(y, num_classes)
    import numpy as np

    if not Path(text).is_file():
        raise FileNotFoundError(f"--targets {text!r} is no file; pass next, or a text file with one class a line")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an empty file; its length is told below
            targets = np.loadtxt(text, dtype=np.int32, ndmin=1)
    except ValueError as error:
        raise ValueError(f"--targets {text}: expected one class number a line; {error}") from None
    if targets.ndim != 1 or len(targets) < len(y):
        raise ValueError(f"--targets {text}: has shape {list(targets.shape)}, expected one class "
                         f"for each of the {len(y)} images; add the missing lines")
    return targets[:len(y)]


def hyperparams(text, method, image_shape, targeted):
    """Turn NAME=VALUE,... into the preset with these changes; None without changes."""
    if text is None:
        return None
    from gse_jax.attacks import default_domain, preset

    _, values = preset(method, default_domain(image_shape), targeted)
    changes = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            changes[name.strip()] = float(value)
        except ValueError:
            raise ValueError(f"--hyperparams: {part!r} is not NAME=VALUE") from None
    unknown = sorted(changes.keys() - values._asdict().keys())
    if unknown:
        raise ValueError(f"--hyperparams: {method} has no {unknown[0]!r}; it has "
                         f"{', '.join(values._asdict())}")
    return values._replace(**changes)


def require_positive(name, value):
    """Refuse an integer option below 1."""
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def numbers(name, text):
    """Turn `inf,1.5,1` into a list of numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be numbers such as inf,1.5,1, got {text!r}") from None


def integers(name, text):
    """Turn `1,3,9` into a list of whole numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be whole numbers such as 1,3, got {text!r}") from None
