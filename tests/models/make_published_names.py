"""Write published_names.json: names and shapes of torchvision's, timm's, RobustBench's tensors.

    pip install torchvision timm && pip install --no-deps robustbench
    python tests/models/make_published_names.py

The modules are those that the published files belong to; no weights are downloaded.
"""

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import timm
import torchvision

# By its file: the package itself imports what is not on PyPI.
PACKAGE = importlib.util.find_spec("robustbench").submodule_search_locations[0]
SPEC = importlib.util.spec_from_file_location(
    "wide_resnet", Path(PACKAGE, "model_zoo", "architectures", "wide_resnet.py"))
WIDE_RESNET = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(WIDE_RESNET)
ROBUSTBENCH = f"robustbench {importlib.metadata.version('robustbench')} wide_resnet28_10"

MODELS = {
    **{f"torchvision {torchvision.__version__.split('+')[0]} {name}": getattr(
        torchvision.models, name) for name in ("resnet18", "resnet50", "vgg19", "vit_b_16")},
    **{f"timm {timm.__version__} {name}": lambda name=name: timm.create_model(name)
       for name in ("resnet18", "resnet50", "vgg19", "vit_base_patch16_224")},
    ROBUSTBENCH: lambda: WIDE_RESNET.WideResNet(28, 10, 10),
    f"{ROBUSTBENCH} with sub_block1": lambda: WIDE_RESNET.WideResNet(28, 10, 10, sub_block1=True),
}
names = {key: {name: list(tensor.shape) for name, tensor in make().state_dict().items()}
         for key, make in MODELS.items()}
text = json.dumps(names, separators=(",", ":")).replace('},"', '},\n"')
(Path(__file__).parent / "published_names.json").write_text(text + "\n", encoding="utf-8")
