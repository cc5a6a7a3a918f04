"""Averages inside PyTorch Lightning and Hugging Face's Trainer, the real packages: what a hand-written loop gives."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from fastreg import EMA, SWA, WeightAverager

RULES = {"ema": EMA(0.8), "swa": SWA()}
ROWS, BATCH, ACCUMULATED, EPOCHS = 24, 2, 3, 2
STEPS = ROWS // BATCH // ACCUMULATED * EPOCHS


class RecordingSGD(torch.optim.SGD):
    """Keeps the weights as each step leaves them."""

    def step(self, closure=None):
        loss = super().step(closure)
        self.left = [*getattr(self, "left", []), [p.detach().clone() for p in self.param_groups[0]["params"]]]
        return loss


def averages_after(left):
    """What each rule makes of the weights that the steps left, by hand."""
    ema = swa = left[0]
    for n, weights in enumerate(left[1:], 1):
        ema = [torch.lerp(e, w, 0.2) for e, w in zip(ema, weights)]
        swa = [s + (w - s) / (n + 1) for s, w in zip(swa, weights)]
    return {"ema": ema, "swa": swa}


def assert_close(tensors, expected):
    for ours, theirs in zip(tensors, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-6)


def assert_averages(averager, left):
    assert averager.n_averaged.item() == len(left)
    for name, expected in averages_after(left).items():
        assert_close(averager.state_dict()["averages"][name].values(), expected)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def rows():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 3, generator=generator), torch.randint(2, (ROWS,), generator=generator)


# ---- Lightning -------------------------------------------------------------------------------------------
@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request):
    if find_spec(request.param.partition(".")[0]) is None:
        pytest.skip(f"{request.param.partition('.')[0]} is not installed")
    return pytest.importorskip(request.param)


@pytest.mark.filterwarnings("ignore")
class TestLightning:
    def module(self, pl, in_validation=lambda module: None):
        class Module(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.net, self.seen = network(), []

            def training_step(self, batch, _):
                return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

            def predict_step(self, batch, _):
                self.seen.append([p.detach().clone() for p in self.parameters()])
                in_validation(self)

            def validation_step(self, batch, _):
                self.predict_step(batch, _)
                self.log("val_loss", self.training_step(batch, _))

            test_step = validation_step

            def configure_optimizers(self):
                return RecordingSGD(self.parameters(), lr=0.5, momentum=0.9)

        return Module()

    def trainer(self, pl, folder, callback, **options):
        options = {
            "max_epochs": EPOCHS,
            "accumulate_grad_batches": ACCUMULATED,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
        } | options
        return pl.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[callback, *options.pop("callbacks", [])],
            **options,
        )

    def loader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows()), BATCH)

    def callback(self, pl, **options):
        from fastreg.lightning import WeightAveraging

        return WeightAveraging(RULES, **options)

    def left(self, trainer):
        return trainer.optimizers[0].left

    def test_updates_once_after_each_accumulated_step_and_validates_with_the_average(self, pl, tmp_path):
        module, callback = self.module(pl), self.callback(pl)
        trainer = self.trainer(pl, tmp_path, callback, num_sanity_val_steps=1)
        trainer.fit(module, self.loader(), self.loader())
        left = self.left(trainer)
        assert len(left) == STEPS
        assert_averages(callback.averager, left)
        sanity, *seen = module.seen
        assert_close(sanity, network().parameters())
        for epoch in range(1, EPOCHS + 1):
            for weights in seen[: ROWS // BATCH]:
                assert_close(weights, averages_after(left[: epoch * STEPS // EPOCHS])["ema"])
            seen = seen[ROWS // BATCH :]
        assert not seen
        assert all(torch.equal(p, w) for p, w in zip(module.parameters(), left[-1]))
        callback.averager.copy_to(module, "swa")
        assert_close(module.parameters(), averages_after(left)["swa"])

    def test_evaluates_with_what_is_asked_for_once_there_is_an_average(self, pl, tmp_path):
        for evaluate, expected in ((False, None), ("swa", "swa")):
            module, callback = self.module(pl), self.callback(pl, evaluate=evaluate, start_step=STEPS // 2)
            trainer = self.trainer(pl, tmp_path, callback)
            trainer.fit(module, self.loader(), self.loader())
            left = self.left(trainer)
            early, late = module.seen[0], module.seen[-1]
            assert all(torch.equal(a, b) for a, b in zip(early, left[STEPS // 2 - 1]))  # no average yet
            assert_close(late, averages_after(left[STEPS // 2 :])[expected] if expected else left[-1])
            for run in (trainer.test, trainer.predict):
                run(module, self.loader())
                assert_close(module.seen[-1], late)
                assert all(torch.equal(p, w) for p, w in zip(module.parameters(), left[-1]))
        from fastreg.lightning import WeightAveraging

        with pytest.raises(ValueError, match="evaluate must be True, False or one of 'ema', 'swa', got 'best'"):
            WeightAveraging(RULES, evaluate="best")
        with pytest.raises(ValueError, match="update_every must be at least 1, got 0"):
            WeightAveraging(RULES, update_every=0)

    def test_resuming_from_a_checkpoint_goes_on_as_if_nothing_had_happened(self, pl, tmp_path):
        whole = self.callback(pl, update_every=3)
        trainer = self.trainer(pl, tmp_path, whole)
        trainer.fit(self.module(pl), self.loader())

        first = self.callback(pl, update_every=3)
        keep = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
        trainer = self.trainer(pl, tmp_path, first, max_epochs=1, callbacks=[keep], enable_checkpointing=True)
        trainer.fit(self.module(pl), self.loader(), self.loader())
        kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert_close(kept["state_dict"].values(), self.left(trainer)[-1])

        second, module = self.callback(pl, update_every=3), self.module(pl)
        trainer = self.trainer(pl, tmp_path, second)
        trainer.fit(module, self.loader(), ckpt_path=tmp_path / "last.ckpt")
        a, b = whole.averager.state_dict(), second.averager.state_dict()
        assert (a["n_averaged"], a["calls"]) == (b["n_averaged"], b["calls"]) and a["calls"] == STEPS
        for name in RULES:
            assert_close(b["averages"][name].values(), a["averages"][name].values())

        tested, module = self.callback(pl), self.module(pl)
        self.trainer(pl, tmp_path, tested).test(module, self.loader(), ckpt_path=tmp_path / "last.ckpt")
        assert_close(module.seen[-1], first.averager.state_dict()["averages"]["ema"].values())

    def test_an_exception_in_validation_gives_the_weights_back(self, pl, tmp_path):
        def fail(module):
            raise KeyError("in validation")

        module, callback = self.module(pl, fail), self.callback(pl)
        trainer = self.trainer(pl, tmp_path, callback)
        with pytest.raises(KeyError):
            trainer.fit(module, self.loader(), self.loader())
        assert all(torch.equal(p, w) for p, w in zip(module.parameters(), self.left(trainer)[-1]))

    @pytest.mark.parametrize("weights_only", [False, True])
    def test_a_checkpoint_taken_in_validation_holds_the_modules_own_weights(self, pl, tmp_path, weights_only):
        def save(module):
            module.trainer.save_checkpoint(tmp_path / "inside.ckpt", weights_only)

        module, callback = self.module(pl, save), self.callback(pl, dtype=torch.float64)
        trainer = self.trainer(pl, tmp_path, callback)
        trainer.fit(module, self.loader(), self.loader())
        left, kept = self.left(trainer), torch.load(tmp_path / "inside.ckpt", weights_only=True)
        assert all(
            torch.equal(kept["state_dict"][name], w) for (name, _), w in zip(module.named_parameters(), left[-1])
        )
        if not weights_only:
            averages = kept["callbacks"]["fastreg.WeightAveraging"]["averages"]
            assert_close((t.float() for t in averages["ema"].values()), averages_after(left)["ema"])
        assert_close(module.seen[-1], averages_after(left)["ema"])  # which the module held again, batches later
        assert all(torch.equal(p, w) for p, w in zip(module.parameters(), left[-1]))

    def test_the_best_checkpoint_has_the_average_that_scored_best(self, pl, tmp_path):
        callback = self.callback(pl)
        keep = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")
        module = self.module(pl)
        trainer = self.trainer(pl, tmp_path, callback, callbacks=[keep], enable_checkpointing=True, max_epochs=4)
        trainer.fit(module, self.loader(), self.loader())
        best = torch.load(keep.best_model_path, weights_only=True)
        left = self.left(trainer)[: best["global_step"]]
        assert all(torch.equal(t, w) for t, w in zip(best["state_dict"].values(), left[-1], strict=True))
        ema = best["callbacks"]["fastreg.WeightAveraging"]["averages"]["ema"]
        assert_close(ema.values(), averages_after(left)["ema"])
        (scores,) = trainer.validate(module, self.loader(), ckpt_path="best", verbose=False)
        assert scores["val_loss"] == pytest.approx(keep.best_model_score.item())
        module.load_state_dict(ema)
        (scores,) = self.trainer(pl, tmp_path, pl.Callback()).validate(module, self.loader(), verbose=False)
        assert scores["val_loss"] == pytest.approx(keep.best_model_score.item())


# ---- Hugging Face ------------------------------------------------------------------------------------------
class Classifier(nn.Module):
    def __init__(self, in_evaluation=lambda model: None):
        super().__init__()
        self.net, self.seen, self.in_evaluation = network(), [], in_evaluation

    def forward(self, x, labels):
        if not self.training:
            self.seen.append([p.detach().clone() for p in self.parameters()])
            self.in_evaluation(self)
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.filterwarnings("ignore")
class TestTransformers:
    @pytest.fixture(autouse=True)
    def package(self):
        for name in ("transformers", "accelerate"):
            if find_spec(name) is None:
                pytest.skip(f"{name} is not installed")

    def trainer(self, folder, model, **options):
        from transformers import Trainer, TrainingArguments

        data = [{"x": x, "labels": y} for x, y in zip(*rows())]
        options = {"num_train_epochs": EPOCHS, "eval_strategy": "epoch", "save_strategy": "epoch"} | options
        evaluated = options.pop("eval_dataset", data)
        return Trainer(
            model,
            TrainingArguments(
                str(folder),
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=ROWS,
                gradient_accumulation_steps=ACCUMULATED,
                max_grad_norm=0.0,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                **options,
            ),
            train_dataset=data,
            eval_dataset=evaluated,
            optimizers=(RecordingSGD(model.parameters(), lr=0.5, momentum=0.9), None),
        )

    def callback(self, trainer, **options):
        from fastreg.transformers import WeightAveraging

        return WeightAveraging(trainer, RULES, **options)

    def left(self, trainer):
        optimizer = trainer.optimizer
        return getattr(optimizer, "optimizer", optimizer).left

    def test_updates_once_after_each_accumulated_step_and_evaluates_with_the_average(self, tmp_path):
        data = [{"x": x, "labels": y} for x, y in zip(*rows())]
        model = Classifier()
        trainer = self.trainer(tmp_path, model, eval_dataset={"one": data, "other": data})
        callback = self.callback(trainer)
        trainer.train()
        left = self.left(trainer)
        assert len(left) == STEPS
        assert_averages(callback.averager, left)
        assert len(model.seen) == 2 * EPOCHS  # each data set in one batch
        for epoch in range(EPOCHS):
            for weights in model.seen[2 * epoch : 2 * epoch + 2]:
                assert_close(weights, averages_after(left[: (epoch + 1) * STEPS // EPOCHS])["ema"])
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), left[-1]))
        trainer.predict(data)
        assert_close(model.seen[-1], averages_after(left)["ema"])
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), left[-1]))

    def test_evaluates_with_what_is_asked_for_once_there_is_an_average(self, tmp_path):
        for evaluate, expected in ((False, None), ("swa", "swa")):
            model = Classifier()
            trainer = self.trainer(tmp_path, model)
            self.callback(trainer, evaluate=evaluate, start_step=STEPS // 2)
            trainer.train()
            left = self.left(trainer)
            assert all(torch.equal(a, b) for a, b in zip(model.seen[0], left[STEPS // 2 - 1]))
            assert_close(model.seen[-1], averages_after(left[STEPS // 2 :])[expected] if expected else left[-1])

    def test_resuming_from_a_checkpoint_goes_on_as_if_nothing_had_happened(self, tmp_path):
        trainer = self.trainer(tmp_path / "whole", Classifier())
        whole = self.callback(trainer, update_every=3)
        trainer.train()
        middle = f"checkpoint-{STEPS // EPOCHS}"
        kept = torch.load(tmp_path / "whole" / middle / "fastreg_averages.pt", weights_only=True)
        assert kept["calls"] == STEPS // EPOCHS
        for resume in (str(tmp_path / "whole" / middle), True):
            folder = tmp_path / "again"
            if resume is True:  # the newest checkpoint in the folder
                (tmp_path / "whole" / middle).rename(tmp_path / "again" / middle)
            trainer = self.trainer(folder, Classifier(), save_strategy="no" if resume is not True else "epoch")
            again = self.callback(trainer, update_every=3)
            folder.mkdir(exist_ok=True)
            trainer.train(resume_from_checkpoint=resume)
            a, b = whole.averager.state_dict(), again.averager.state_dict()
            assert (a["n_averaged"], a["calls"]) == (b["n_averaged"], b["calls"]) and a["calls"] == STEPS
            for name in RULES:
                assert_close(b["averages"][name].values(), a["averages"][name].values())

    def test_resuming_without_averages_says_so_and_starts_anew(self, tmp_path):
        self.trainer(tmp_path, Classifier(), num_train_epochs=1).train()
        trainer = self.trainer(tmp_path, Classifier())
        callback = self.callback(trainer)
        with pytest.warns(UserWarning, match=r"fastreg_averages\.pt does not exist"):
            trainer.train(resume_from_checkpoint=True)
        assert_averages(callback.averager, self.left(trainer))

    def test_an_exception_in_evaluation_gives_the_weights_back(self, tmp_path):
        def fail(model):
            raise KeyError("in evaluation")

        model = Classifier(fail)
        trainer = self.trainer(tmp_path, model)
        self.callback(trainer)
        with pytest.raises(KeyError):
            trainer.train()
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), self.left(trainer)[-1]))

    def test_a_model_saved_in_evaluation_is_the_models_own(self, tmp_path):
        from safetensors.torch import load_file

        model = Classifier(lambda _: trainer.save_model(str(tmp_path / "inside")))
        trainer = self.trainer(tmp_path, model)
        self.callback(trainer)
        trainer.train()
        kept, left = load_file(tmp_path / "inside" / "model.safetensors"), self.left(trainer)
        assert all(torch.equal(kept[name], w) for (name, _), w in zip(model.named_parameters(), left[-1]))
        trainer.evaluate()
        assert_close(model.seen[-1], averages_after(left)["ema"])


# ---- both --------------------------------------------------------------------------------------------------
def test_the_package_imports_neither_trainer(tmp_path):
    import subprocess
    import sys

    code = "import fastreg, sys; sys.exit(any(name in sys.modules for name in ('lightning', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_averager_of_no_parameters_checks_its_arguments():
    """What the callbacks rely on to tell wrong arguments before training begins."""
    with pytest.raises(TypeError, match="unexpected keyword"):
        WeightAverager(nn.Module(), RULES, decay=0.9)
