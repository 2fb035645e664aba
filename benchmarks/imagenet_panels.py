"""The paper's ImageNet protocol on real images of 224 x 224 pixels: metrics, evaluations, panels.

    python benchmarks/imagenet_panels.py [--num 16] [--folder imagenet_panels]

GSE with its ImageNet preset against a MobileNet that is handed over as a plain function, on the
first correctly classified images of the NIPS 2017 development set, untargeted and targeted (label +
857, the first of the paper's ten). Needs both (folder named by GSE_JAX_SHARED); without them, and
with --smoke, a ResNet-20 on enlarged digits takes their place and nothing is written to results.
"""

import importlib.util
import tempfile
from pathlib import Path

import jax
import numpy as np

import gse_jax
import results_file
from gse_jax import data, evaluation, models, report

FOLDER = results_file.SHARED / "data"
OFFSET = 857  # the first entry of the paper's list of ImageNet targets, added to the label
FIRST = 10  # rows of their own for the correctly classified of the first ten images


class MobileNet:
    """A classifier as a user would hand it over: a forward pass that somebody else wrote.

    `features` and `head` are not needed for an attack; with them `explain` draws activation maps.
    """

    def __init__(self, forward, layers, norm):
        self.forward, self.layers, self.norm = forward, layers, norm

    def __call__(self, params, x):
        return self.forward.apply(params, self.layers, self.norm, x)

    def features(self, params, x):
        """Logits and the last feature map: what comes before pooling and the dense layer."""
        body = self.layers[:[layer["kind"] for layer in self.layers].index("gap")]
        maps = self.forward.apply(params, body, self.norm, x)
        return maps.mean((1, 2)) @ self.head(params) + params["head/bias"], maps

    def head(self, params):
        """The dense layer's kernel, [channels, classes]."""
        return params["head/kernel"]


def real(count):
    """(params, apply_fn, x, y, ids): the first correctly classified of the 100 images."""
    spec = importlib.util.spec_from_file_location("forward", FOLDER / "imagenet" / "forward.py")
    forward = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(forward)
    params, layers, norm = forward.load(FOLDER / "imagenet" / "mobilenet_edgetpu_075_f16.npz")
    apply_fn = MobileNet(forward, layers, norm)
    images = data.load(f"npz:{FOLDER / 'nips2017' / 'first_100_224.npz'}")
    predictions, _ = evaluation.predict(params, apply_fn, images.images)
    results_file.show({"accuracy on 100 images": float((predictions == images.labels).mean())})
    # The 24 originals of 299 x 299, as published: table of 1-based labels, stretched on reading.
    files = data.load(f"nips2017:{FOLDER / 'nips2017' / 'folder'},size=224")
    predictions_of_files, _ = evaluation.predict(params, apply_fn, files.images)
    results_file.show({"accuracy on 24 PNG files": float((predictions_of_files
                                                          == files.labels).mean())})
    chosen = np.flatnonzero(predictions == images.labels)[:count]
    return (params, apply_fn, images.images[chosen], images.labels[chosen],
            np.asarray(images.ids)[chosen], int((chosen < FIRST).sum()))


def embedded(count):
    """The same from the shipped digits, enlarged beyond the size that takes the CIFAR preset."""
    apply_fn, params = models.load("resnet20", weights="digits")
    images = data.load("digits", limit=count)
    x = images.images.repeat(3, 1).repeat(3, 2)
    y, _ = evaluation.predict(params, apply_fn, x)
    return params, apply_fn, x, y, np.asarray(images.ids), count


def numbers_of(run, part):
    """The table's columns over some of a run's images."""
    chosen = run._replace(**{name: value[part] for name, value in run._asdict().items()
                             if name != "about"})
    numbers = chosen.summary()
    return {"images": numbers.num_attacked, "ASR": numbers.asr_attacked,
            "ACP": numbers.changed_pixels.mean, "ANC": numbers.num_clusters.mean,
            "l2": numbers.l2.mean, "d20": numbers.patch_count.mean,
            "d20_standard_error": numbers.patch_count.standard_error,
            "evals_per_image": numbers.gradient_evals.mean,
            "forwards_per_image": numbers.forward_evals.mean}


def explained(run, params, apply_fn, stem):
    """Draw panels of four images each; return the numbers of the explanation."""
    explanation = evaluation.explain(run, params, apply_fn)
    maps = {"saliency": explanation.saliency}
    row = {f"IS_{p}": float(explanation.interpretability[explanation.found, i].mean())
           for i, p in enumerate(evaluation.PERCENTILES)}
    if explanation.activation is not None:
        maps["CAM"] = explanation.activation.clip(min=0)
        overlap = explanation.activation_overlap
        scores = overlap.score[explanation.found]
        row["CAM_overlap"] = float(scores.mean())
        row["CAM_overlap_standard_error"] = float(scores.std(ddof=1) / len(scores) ** 0.5)
        row["CAM_overlap_anywhere"] = float(overlap.control[explanation.found].mean())
    for start in range(0, len(run.y), 4):
        part = slice(start, start + 4)
        figure = report.attack_panel(
            run.x[part], run.adversarials[part],
            report.Prediction(run.predictions_before[part], run.confidences_before[part]),
            report.Prediction(run.predictions_after[part], run.confidences_after[part]),
            status=run.status[part], heat_maps={name: m[part] for name, m in maps.items()})
        report.save_figure(figure, Path(f"{stem}_{start // 4}"))
    return row


def main():
    """Measure, print, draw."""
    arguments = results_file.parser(__doc__.splitlines()[0])
    arguments.add_argument("--num", type=int, default=16)
    arguments.add_argument("--method", default="gse")
    arguments.add_argument("--untargeted", action="store_true", help="leave out the targeted run")
    arguments.add_argument("--folder", default="imagenet_panels", help="where panels go")
    args = arguments.parse_args()
    gse_jax.use_all_cpu_cores()
    args.smoke = args.smoke or not (FOLDER / "imagenet").is_dir()
    params, apply_fn, x, y, ids, first = embedded(2) if args.smoke else real(args.num)
    name = "digits, ResNet-20 (nothing kept)" if args.smoke else "NIPS 2017, MobileNet"
    settings = gse_jax.GSESettings(num_runs=2, max_steps=5, phase1_steps=3) if args.smoke else None
    num_classes = jax.eval_shape(apply_fn, params, x[:1]).shape[-1]
    folder = Path(tempfile.mkdtemp() if args.smoke else args.folder)
    rows = []
    directions = (("untargeted", None), ("targeted", (y + OFFSET) % num_classes))
    for word, targets in directions[:1 if args.untargeted or args.smoke else 2]:
        run = evaluation.run_attack(params, apply_fn, x, y, targets=targets, ids=ids,
                                    method=args.method, settings=settings)
        evaluation.save_run(run, folder / word / "adversarials.npz")
        for part in ([slice(None)] if first == len(x) else [slice(None), slice(first)]):
            rows.append({"attack": word, "model": name, **numbers_of(run, part)})
            results_file.show(rows[-1])
        rows[-1 if first == len(x) else -2] |= {
            "seconds_per_image_with_compilation": run.about["seconds"] / len(x),
            **explained(run, params, apply_fn, folder / word / "panel")}
        results_file.show(rows[-1 if first == len(x) else -2])
    suffix = "" if args.method == "gse" else f"_{args.method}"
    results_file.write(f"imagenet_panels{suffix}", args, rows)


if __name__ == "__main__":
    main()
