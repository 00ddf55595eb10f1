"""What can be tested of a GPU without one: whole commands on a pretended device, and tensors without values.

The pretended device is the CPU under the name cuda:0. It shows that the branches for CUDA work together, and what
happens when memory runs out; it does not show the speed, the rounding or the asynchrony of a GPU. On fake tensors,
which have shapes and devices but no values, torch refuses to mix devices in one operation, and to read a value, for
which a GPU would have to be waited for.
"""

import contextlib
import csv
import functools

import common
import pytest
import torch
import train
from common import InferenceModel, UserError
from conftest import SMALL, TINY, load_pt
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

CUDA = [*SMALL[:-3], "cuda"]  # without --precision
TINY_CUDA = [*TINY[:-3], "cuda"]
NOT_FOUND = "Found no NVIDIA driver on your system."


class CudaIsTheCpu(TorchFunctionMode):
    """Let all functions of torch that are given a CUDA device use the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def swap(value):
            is_cuda = isinstance(value, (torch.device, str)) and str(value).startswith("cuda")
            return torch.device("cpu") if is_cuda else value

        if function is torch.device:
            return function(*args, **kwargs or {})
        return function(*map(swap, args), **{key: swap(value) for key, value in (kwargs or {}).items()})


@pytest.fixture
def machine(monkeypatch):
    """Return a function that pretends a machine with `count` GPUs of a compute capability."""

    def pretend(count=1, capability=(8, 0), name="Pretended GPU"):
        patches = {
            "is_available": lambda: count > 0,
            "device_count": lambda: count,
            "set_device": lambda device: None,
            "get_device_name": lambda device: name,
            "get_device_capability": lambda device: capability,
            "is_bf16_supported": lambda including_emulation: capability >= (8, 0),
            "mem_get_info": lambda device: (8 << 30, 8 << 30),
            "empty_cache": lambda: None,
        }
        for function, value in patches.items():
            monkeypatch.setattr(torch.cuda, function, value)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        for kind in ("cuda", "accelerator"):  # a check of the real device, under its names of torch 2.6 and 2.9
            check = f"_{kind}_graph_capture_health_check"
            monkeypatch.setattr(torch.optim.Optimizer, check, lambda optimizer: None, raising=False)
        no_mps = functools.wraps(torch.backends.mps.is_available)(lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", no_mps)

    for module, name in ((torch.backends, "fp32_precision"), (torch.backends.cudnn, "benchmark")):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, getattr(module, name))  # restored in the end
    return pretend


@pytest.fixture
def gpu(machine):
    """Pretend a GPU that has bf16."""
    machine()
    with CudaIsTheCpu():
        yield


# ---------------------------------------------------------------- whole commands


def test_a_frozen_network_on_a_gpu(run, trained, tree, gpu, tmp_path):
    args = ["--data", tree, "--out", tmp_path, "--epochs", 4, "--lr", 0.01, *CUDA, "--precision", "fp32"]
    result = run("train", *args)
    first = result.err.splitlines()[0]
    assert first.endswith("device: cuda:0 Pretended GPU, fp32")
    # The same numbers as on the CPU: the pixels, the order and the arithmetic are the same.
    ours, cpu = (load_pt(folder / "model.pt")["state_dict"]["fc.weight"] for folder in (tmp_path, trained.folder))
    assert (ours - cpu).abs().max() < 1e-4 * cpu.abs().max()
    args = ["--checkpoint", tmp_path / "model.pt", "--device", "cuda"]
    assert "cuda:0" in run("evaluate", *args, "--data", tree).json["timing"]
    pages = ["--plot", tmp_path / "pages.png", "--explain"]
    lines = run("predict", *args, tree / "test", *pages).out.splitlines()
    assert len(lines) == 1 + len(list((tree / "test").glob("*/*"))) and (tmp_path / "pages.png").exists()
    predicted = [row["class"] for row in csv.DictReader(lines)]
    expected = run("predict", "--checkpoint", trained.model, tree / "test", "--device", "cpu").out.splitlines()
    assert predicted == [row["class"] for row in csv.DictReader(expected)]


def test_auto_is_bf16(run, tree, gpu, tmp_path):
    result = run("train", "--data", tree, "--out", tmp_path, "--epochs", 1, *TINY_CUDA, "--augment", "dihedral")
    assert result.err.splitlines()[0].endswith("cuda:0 Pretended GPU, bf16")
    assert load_pt(tmp_path / "model.pt")["args"]["precision"] == "bf16"


def test_an_older_gpu_computes_in_fp16_and_fine_tunes_in_fp32(run, tree, machine, tmp_path):
    machine(capability=(7, 5), name="NVIDIA T4")
    args = ["--data", tree, "--epochs", 1, *TINY_CUDA]
    with CudaIsTheCpu():
        assert "NVIDIA T4, fp16" in run("train", *args, "--out", tmp_path / "a").err
        assert "NVIDIA T4, fp32" in run("train", *args, "--out", tmp_path / "b", "--finetune", "last").err
        message = run("train", *args, "--out", tmp_path / "c", "--precision", "bf16", code=2).error[0]
    assert "NVIDIA T4 does not support it; use fp16 or fp32" in message


# ---------------------------------------------------------------- memory

OUT_OF_MEMORY = [
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "MPS backend out of memory (MPS allocated: 8.00 GB)",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
]


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_batches_are_halved_until_they_fit(run, trained, tree, gpu, tmp_path, monkeypatch, message):
    forward = InferenceModel._forward_batch

    def limited(model, pixels):
        if model.batch_size > 10:  # to which batches are padded
            raise RuntimeError(message)
        return forward(model, pixels)

    expected = run("predict", "--checkpoint", trained.model, tree / "test", "--device", "cuda").out
    monkeypatch.setattr(InferenceModel, "_forward_batch", limited)
    assert run("predict", "--checkpoint", trained.model, tree / "test", "--device", "cuda").out == expected

    def too_large(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(InferenceModel, "_forward_batch", too_large)
    error = run("predict", "--checkpoint", trained.model, tree / "test", "--device", "cuda", code=2).error[0]
    assert "not enough memory on cuda:0" in error


def test_fine_tuning_saves_memory_in_steps(run, tree, gpu, tmp_path, monkeypatch):
    """The pixels on the device are dropped first, then the gradients are computed in parts, with the same result."""
    args = ["--data", tree, "--finetune", "all", "--epochs", 2, *TINY_CUDA, "--precision", "fp32"]
    args += ["--weights", tmp_path / "weights.pt", "--augment", "none"]
    torch.save(common.build_model("shufflenet_v2_x0_5", {}).state_dict(), tmp_path / "weights.pt")
    run("train", *args, "--out", tmp_path / "a")
    forward = train.FineTuner.forward

    def limited(learner, inputs, active):
        if learner.pixels.resident or len(inputs) > 10:
            raise RuntimeError(OUT_OF_MEMORY[0])
        return forward(learner, inputs, active)

    monkeypatch.setattr(train.FineTuner, "forward", limited)
    lines = run("train", *args, "--out", tmp_path / "b").err
    assert lines.index("read from their files") < lines.index("in 2 parts") < lines.index("in 4 parts")
    a, b = (load_pt(tmp_path / name / "model.pt")["state_dict"] for name in "ab")
    assert all(torch.allclose(a[key].float(), b[key].float(), rtol=1e-3, atol=1e-4) for key in a)

    def too_large(*_):
        raise RuntimeError(OUT_OF_MEMORY[2])

    monkeypatch.setattr(train.FineTuner, "forward", too_large)
    assert "try --batch-size 32" in run("train", *args, "--out", tmp_path / "c", code=2).error[0]


def test_other_failures_are_not_blamed_on_memory_or_image_size(trained, tree, gpu, monkeypatch):
    import predict

    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(InferenceModel, "_forward_batch", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        predict.main(["--checkpoint", str(trained.model), str(tree / "test"), "--device", "cuda"])


# ---------------------------------------------------------------- devices and precisions


@pytest.mark.parametrize(
    "name, count, expected",
    [
        (None, 0, "cpu"),
        (None, 1, "cuda:0"),
        ("cpu", 1, "cpu"),
        ("cuda", 2, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
        ("cuda:1", 1, "not available here (1 cuda device found)"),
        ("cuda", 0, "not available here (0 cuda devices found)"),
        ("mps", 0, "not available here (0 mps devices found)"),
        ("tpu", 1, "unknown"),
    ],
)
def test_pick_device(machine, name, count, expected):
    machine(count)
    with CudaIsTheCpu():
        if expected.startswith(("cpu", "cuda")):
            assert str(common.pick_device(name)) == expected
        else:
            with pytest.raises(UserError) as error:
                common.pick_device(name)
            assert expected in str(error.value)


@pytest.mark.parametrize("name", [None, "cuda"])
def test_a_gpu_that_torch_cannot_use_is_an_error(machine, monkeypatch, name):
    machine(0)
    reason = "The NVIDIA driver on your system is too old (found version 11040)."

    def init():
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.cuda, "init", init)
    exists = common.os.path.exists
    monkeypatch.setattr(common.os.path, "exists", lambda path: path == "/dev/nvidiactl" or exists(path))
    with pytest.raises(UserError) as error:
        common.pick_device(name)
    assert reason in str(error.value) and "--device cpu" in str(error.value)
    assert common.pick_device("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    if name is None:
        assert common.pick_device(name).type == "cpu"


def test_a_gpu_without_kernels_in_this_build_is_an_error(machine):
    machine(name="Tesla V100")

    class NoKernel(CudaIsTheCpu):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.ones:
                raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
            return super().__torch_function__(function, types, args, kwargs)

    with (
        NoKernel(),
        pytest.raises(UserError, match=r"cuda:0 Tesla V100 cannot compute .*no kernel image.*--device cpu"),
    ):
        common.pick_device(None)


@pytest.mark.parametrize(
    "name, device, capability, expected",
    [
        ("auto", "cuda:0", (9, 0), torch.bfloat16),
        ("auto", "cuda:0", (7, 5), torch.float16),
        ("auto", "cuda:0", (6, 1), torch.float32),
        ("auto", "mps", (0, 0), torch.float32),
        ("fp32", "cuda:0", (9, 0), torch.float32),
        ("fp16", "cuda:0", (9, 0), torch.float16),
        ("fp16", "mps", (0, 0), torch.float16),
        ("fp16", "cpu", (0, 0), "use bf16 or fp32"),
        ("bf16", "cpu", (0, 0), torch.bfloat16),
        ("bf16", "cuda:0", (7, 0), "use fp16 or fp32"),
    ],
)
def test_pick_precision(machine, name, device, capability, expected):
    machine(capability=capability)
    context = pytest.raises(UserError, match=expected) if isinstance(expected, str) else contextlib.nullcontext()
    with context:
        assert common.pick_precision(name, torch.device(device)) == expected


def test_fp32_is_not_tf32(machine, monkeypatch):
    machine()
    with CudaIsTheCpu():
        common.pick_device("cuda")
    backends = torch.backends
    if hasattr(backends, "fp32_precision"):
        assert backends.cudnn.conv.fp32_precision == backends.cuda.matmul.fp32_precision == "ieee"
    else:
        assert not backends.cudnn.allow_tf32 and not backends.cuda.matmul.allow_tf32


# ---------------------------------------------------------------- fake tensors


GPU = torch.device("cuda:0")


@pytest.fixture
def fake(monkeypatch):
    """Return a mode in which tensors are fake, and may be on a device that does not exist."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        pytest.skip("before torch 2.10, fake tensors need a real GPU")
    monkeypatch.setattr(
        common, "cached_resize_weights", lambda old, new, _, device: torch.zeros(new, old, device=device)
    )
    for module in (common, train):  # torch would compute constants for real
        monkeypatch.setattr(module, "to_device", lambda tensor, device: tensor.new_empty(tensor.shape, device=device))
    return FakeTensorMode(allow_non_fake_inputs=True)


def to_fake_gpu(module, dtype=None):
    """Replace the tensors of a module by fake ones on the GPU."""
    for inner in module.modules():
        for tensors in (inner._parameters, inner._buffers):
            for name, old in tensors.items():
                if old is not None:
                    kind = dtype if dtype and old.is_floating_point() else old.dtype
                    new = torch.empty(old.shape, device=GPU, dtype=kind)
                    is_parameter = isinstance(old, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(new, old.requires_grad) if is_parameter else new


def make_model():
    """Return an inference model on the CPU."""
    model = common.build_model("resnet18", {"num_classes": 3})
    preprocessing = {"size": 32, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.2] * 3}
    network = common.Network("resnet18", {"num_classes": 3}, preprocessing, model.eval())
    return InferenceModel(network, torch.device("cpu"), "fp32")


def move_to_fake_gpu(model):
    """Move an inference model, as if it had been made there."""
    to_fake_gpu(model.backbone, torch.bfloat16)
    to_fake_gpu(model.head)
    model.device, model.dtype, model.batch_size = GPU, torch.bfloat16, 128
    model.mean, model.scale = torch.zeros(2, 96, device=GPU)


def test_fake_tensors_notice_mixed_devices_and_waits(fake):
    with fake:
        a = torch.ones(2, device=GPU)
        with pytest.raises(RuntimeError, match="devices"):
            a + torch.ones(2)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            a.sum().item()


def test_the_pass_stays_on_the_device(fake):
    model = make_model()
    _ = model.backbone
    with fake:
        move_to_fake_gpu(model)
        pixels = torch.zeros(5, 3, 20, 20, dtype=torch.uint8)
        logits = model.forward_head(model.forward_views(pixels, common.VIEWS["dihedral"]))
        assert logits.shape == (8, 5, 3) and logits.device == GPU
        features = model.forward_features(torch.zeros(130, 3, 32, 32, dtype=torch.uint8))
        assert features.shape == (130, 512) and features.device == GPU


def skip_backward(monkeypatch, parameters):
    """Replace the backward pass, whose engine looks for a real device, by gradients of zeros."""

    def backward(loss):
        assert loss.device == GPU and loss.requires_grad
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)


def test_training_a_classifier_stays_on_the_device(fake, monkeypatch):
    head = torch.nn.Sequential(torch.nn.BatchNorm1d(8, affine=False).eval(), torch.nn.Linear(8, 3))
    hparams = train.HParams(lr=0.1, weight_decay=0.01, label_smoothing=0.1, epochs=1)
    options = train.TrainOptions(16, 0, torch.ones(3))
    data = train.LabeledFeatures(torch.zeros(2, 100, 8), torch.zeros(100, dtype=torch.int64))
    probes = train.LinearProbes(head, {"train": data}, options, 2)
    with fake:
        for own in probes.heads:
            to_fake_gpu(own)
        values = torch.zeros(2, 100, 8, device=GPU), torch.zeros(100, device=GPU, dtype=torch.int64)
        probes.data, probes.targets, probes.device = (
            {"train": train.LabeledFeatures(*values)},
            {"train": values[1]},
            GPU,
        )
        probes.options = train.TrainOptions(16, 0, torch.ones(3))
        optimizer = torch.optim.AdamW(probes.param_groups([hparams, hparams]))
        skip_backward(monkeypatch, [parameter for own in probes.heads for parameter in own.parameters()])
        runs = [train.Run(hparams, 0), train.Run(hparams, 0)]
        train.train_one_epoch(probes, optimizer, runs, [0, 1], 1, 1)
        for logits, targets in probes.eval_batches("train", [0, 1]):
            assert logits.device == targets.device == GPU


def test_a_forward_pass_of_fine_tuning_stays_on_the_device(fake):
    model = make_model()
    backbone, head = model.copy_backbone(), torch.nn.Linear(512, 3)
    _ = model.backbone
    with fake:
        move_to_fake_gpu(model)
        to_fake_gpu(backbone)
        to_fake_gpu(head)
        joined = train.build_network(backbone, head, model.dtype)
        pixels = model.load_pixels(torch.zeros(4, 3, 20, 20, dtype=torch.uint8))
        targets = torch.zeros(4, device=GPU, dtype=torch.int64)
        augmentation = train.Augmentation(common.VIEWS["dihedral"], 3)
        images, targets = train.augment_batch(pixels, targets, augmentation, model.normalize)
        logits = joined(images)[:, None]
        smoothing, weights = torch.zeros(1, device=GPU), torch.ones(3, device=GPU)
        assert train.cross_entropies(logits, targets, smoothing, weights).sum().device == GPU
