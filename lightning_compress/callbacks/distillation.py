"""Knowledge distillation during a fit: what the teacher says of each batch joins the user's own loss."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_compress.callbacks.checkpoint import attach_state, attached_state
from lightning_compress.callbacks.clock import completed_steps, total_steps
from lightning_compress.callbacks.distilled_methods import Wrapper, join_batches, join_methods, leave_methods
from lightning_compress.callbacks.forward_tap import ForwardCall, ForwardTap
from lightning_compress.callbacks.kept_answers import KeptAnswers
from lightning_compress.callbacks.learned_adaptors import STATE_KEY, LearnedAdaptors, first_optimizer
from lightning_compress.callbacks.random_state import RandomState, attach_random_state
from lightning_compress.callbacks.stripping import strip
from lightning_compress.callbacks.trainers import check_trainer, has_late_layers
from lightning_compress.copying import copy_of
from lightning_compress.distillation import (
    Annealing,
    Answer,
    DistillationLoss,
    LogitDistillation,
    Network,
    OutputSelector,
    Teacher,
    TeacherCache,
    TeacherEnsemble,
    as_teachers,
    check_selector,
    number,
    output_shapes,
    paired_names,
    select_labels,
    select_logits,
    split_name,
    without_numbers,
)
from lightning_compress.errors import CompressionError
from lightning_compress.settings import plain


class KnowledgeDistillation(Callback):
    """Train with the user's loss plus terms that pull the student towards a trained teacher.

    By default that is ``loss + weight * T^2 * KL(teacher || student)`` (Hinton et al. 2015, arXiv:1503.02531).
    ``losses`` takes any list of others, over what the networks return and over what modules inside of them return, each
    with a weight that may change over the run. The teacher runs once for all of them.

    ``loss`` is what the LightningModule's ``training_step`` returns, or hands to ``manual_backward``; it stays as the
    user wrote it. The student's outputs are those of the network's forward inside ``training_step``; the teacher gets
    the same arguments. A step that calls the network several times gets the mean over these calls; calls whose output
    needs no gradient do not count.

    The teacher is frozen, in eval mode, and no part of the LightningModule: neither checkpoints nor optimizers, DDP,
    averaged weights or summaries know of it. After the fit it is given back as it came. Adaptors, which some losses
    learn, are in no module tree either: they learn with the first parameter group of the first optimizer, and travel
    under our own key of the checkpoint. The sum that was added is logged as ``compress/distillation_loss``, and where
    there are several losses, each without its weight under its own name, such as ``compress/attention_transfer``.

    Args:
        teacher: A trained network: any ``nn.Module``, LightningModule or other callable that takes the student's
            inputs, the path of an ONNX file, ``"self"`` for the student in float as it is when the run begins, or
            ``"ema"`` for the moving average of its weights; a `Teacher` where it needs other inputs or precision; a
            list for the mean of several, whose modules are then named ``"0.layer"``, ``"1.layer"``.
        losses: What to add: `DistillationLoss` objects such as `LogitDistillation` and `FeatureDistillation`.
        temperature: Softness ``T`` of both distributions, above 0, where ``losses`` is not given; 4 by default.
        weight: Factor in front of the distillation term, at least 0, where ``losses`` is not given; 0.7 by default.
        output: Where the logits, of shape ``(N, C)`` or ``(N, C, *spatial)``, are in what the networks return: a key
            or attribute (str), a position (int), or a function of the output. By default the output itself where it
            is a tensor, else its ``logits``.
        labels: Where the classes are in a batch, for losses that need them: as ``output``. By default under one of the
            names ``labels``, ``label``, ``targets``, ``target`` and ``y``, else last in a tuple or list.
        task_loss: Whether the user's own loss counts; with False the terms alone are trained, and ``training_step``
            may return None.
        module: Name of the submodule that is the student's network, where it cannot be found: by default the
            LightningModule itself if the step calls it, else the one child that holds all layers.
        teacher_checkpoint: A file with the teacher's weights, of a Trainer or of `torch.save`, to be loaded into
            ``teacher`` first; also where the teacher was a part of the module that was saved.
        cache: A folder, or a `TeacherCache`, in which the teacher's answers are kept by the number of the sample, so
            that it runs in the first epoch alone, and not at all in later runs or after `fill_cache`. The training data
            must be an `IndexedDataset`.

    Raises:
        CompressionError: If ``teacher_checkpoint`` does not hold the teacher's weights.
        TypeError: If ``teacher`` cannot teach, ``output`` cannot select, or a loss is none.
        ValueError: If ``temperature`` or ``weight`` is out of range, or given together with ``losses``.

    Example:
        >>> from torch import nn
        >>> teacher = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        >>> callback = KnowledgeDistillation(teacher, temperature=4.0, weight=0.7)
        >>> from lightning_compress.distillation import FeatureDistillation
        >>> losses = [LogitDistillation(temperature=4.0, weight=0.7), FeatureDistillation(layers=["1"], weight=0.1)]
        >>> callback = KnowledgeDistillation(teacher, losses=losses)
        >>> trainer = pl.Trainer(max_epochs=3, callbacks=[callback], logger=False)  # trainer.fit(model, loader)
    """

    def __init__(
        self,
        teacher: Teacher | Network | Sequence[Teacher | Network],
        *,
        losses: Sequence[DistillationLoss] | None = None,
        temperature: float | None = None,
        weight: float | None = None,
        output: OutputSelector = None,
        labels: OutputSelector = None,
        task_loss: bool = True,
        module: str | None = None,
        teacher_checkpoint: str | os.PathLike[str] | None = None,
        cache: TeacherCache | str | os.PathLike[str] | None = None,
    ) -> None:
        check_selector(output)
        check_selector(labels, "labels")
        self.losses = _checked_losses(losses, *plain((temperature, weight)))
        self._teacher = TeacherEnsemble(as_teachers(teacher, teacher_checkpoint))
        self._kept = KeptAnswers(cache, self._teacher, self.losses)
        self._output = output
        self._labels = labels
        self._task_loss = task_loss
        self._module = module
        self._tap: ForwardTap | None = None
        self._pairs: list[dict[str, str]] = [{} for _ in self.losses]
        self._are_in_network = False
        self._learned = LearnedAdaptors()
        self._batch: Any = None
        self._index: Tensor | None = None
        self._total_steps: int | None = None
        self._last_step = 0
        self._network: str | None = None
        self._n_used_calls = 0
        self._saw_manual_backward = False
        self._was_added = False
        self._wrappers: list[Wrapper] = []
        self._random = RandomState()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Freeze the teacher and put the term into the module's step."""
        if stage != "fit":
            self._wrappers = join_batches(self, trainer, pl_module)
            return
        check_trainer(trainer, self)
        self._release(pl_module)  # what a fit that was cut off may have left
        self._random = attach_random_state(pl_module)
        self._learned = LearnedAdaptors(
            dict(zip(_unique_names(self.losses), self.losses, strict=True)), self._teacher.own
        )
        has_state = any(type(loss).adaptors is not DistillationLoss.adaptors for loss in self.losses)
        # That of an earlier fit must not go on into new checkpoints.
        if has_state or self._teacher.own or attached_state(pl_module, STATE_KEY, LearnedAdaptors) is not None:
            attach_state(pl_module, STATE_KEY, self._learned.save, self._learned.load)
        self._teacher.check_apart_from(pl_module)
        self._teacher.freeze()
        self._saw_manual_backward = self._was_added = False
        self._kept.close()
        self._wrappers = join_methods(self, trainer, pl_module)
        if not has_late_layers(pl_module):  # else only `on_fit_start` can tell
            self._pair_modules(pl_module)

    def _pair_modules(self, pl_module: pl.LightningModule) -> None:
        """Find the modules that the losses name, in both networks."""
        if not any(loss.pairs for loss in self.losses):
            return
        tap = ForwardTap(pl_module, self._module)
        tap.remove()
        student = {name: name for name, _ in pl_module.named_modules()}
        for root in tap.roots:  # a name may be that of a module of the network that the step calls
            for name, _ in pl_module.get_submodule(root).named_modules():
                student.setdefault(name, f"{root}.{name}" if root and name else root or name)
        names = self._teacher.names(list(student))
        self._pairs, self._are_in_network = [], False
        for loss in self.losses:
            pairs = paired_names(loss.pairs, student, names, type(loss).__name__)
            self._pairs.append({_located(mine, student): theirs for mine, theirs in pairs.items()})
        self._tap_teachers()

    def _tap_teachers(self) -> None:
        self._teacher.tap([theirs for pairs in self._pairs for theirs in pairs.values()])

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to the network, whose layers all exist only now."""
        self._pair_modules(pl_module)
        self._stop_listening()
        self._listen_to(pl_module)
        self._random.restore()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let random numbers go on where a checkpoint left them."""
        self._random.begin(trainer)
        self._total_steps, self._last_step = None, completed_steps(trainer)
        self._open_cache(trainer.train_dataloader, _dtype_of(pl_module))
        if self._last_step == 0:  # a new run begins with the student as it is now
            for teacher in self._teacher.own:
                teacher.forget()

    def _open_cache(self, loaders: Any, dtype: torch.dtype) -> None:
        layers = sorted({theirs for pairs in self._pairs for theirs in pairs.values()})
        self._kept.open(loaders, self._output if self._reads_output else False, layers, dtype)

    def fill_cache(
        self,
        pl_module: pl.LightningModule,
        loader: DataLoader[Any],
        *,
        inputs: Callable[[Any], Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> int:
        """Ask the teacher of all samples before a fit, which then never has to ask it.

        What the network gets in the fit must be what it gets here: no augmentation in between. With views, every view
        is asked of. An interrupted call goes on where it ended.

        Args:
            pl_module: The module that will be trained, in its precision: for ``precision="bf16-true"`` one of bfloat16.
            loader: A loader over the training data, an `IndexedDataset`, whose batch size, workers and collate function
                are taken over.
            inputs: Takes the arguments of the network out of a batch: a tensor, a tuple, or a dict of keywords. By
                default the batch itself, or the first entry of a tuple or list.
            device: Where the teacher runs.

        Returns:
            How many entries the cache has now.

        Raises:
            ValueError: If there is no ``cache``.
            CompressionError: If the data do not tell the numbers of their samples, or the cache is that of others.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> from lightning.pytorch.demos.boring_classes import BoringModel
            >>> from torch import nn
            >>> from lightning_compress import IndexedDataset
            >>> loader = DataLoader(IndexedDataset([torch.zeros(32), torch.ones(32)]), batch_size=2)
            >>> with TemporaryDirectory() as folder:
            ...     callback = KnowledgeDistillation(nn.Linear(32, 2), cache=folder)
            ...     callback.fill_cache(BoringModel(), loader)
            2
        """
        if not self._kept.has_cache:
            raise ValueError("There is no cache to fill: give `cache` a folder.")
        device = torch.device(device)
        self._teacher.freeze()
        try:
            self._pair_modules(pl_module)
            dtype = _dtype_of(pl_module)
            self._open_cache(loader, dtype)
            self._teacher.move_to(device, dtype)
            select = self._teacher_logits if self._reads_output else None
            return self._kept.fill(loader, inputs, select, device, dtype)
        finally:
            self._kept.close()
            self._teacher.release()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the average of the student's weights follow it."""
        step = completed_steps(trainer)
        if step != self._last_step and self._network is not None:
            for teacher in self._teacher.own:
                teacher.follow(pl_module.get_submodule(self._network))
        self._last_step = step

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Average the gradients of the adaptors, which DDP does not know of, over the processes.

        Before a gradient scaler looks at them: all processes must find the same infinite ones.
        """
        self._learned.average_gradients()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the hooks away, so that an export at the end of the fit sees the user's module."""
        self._random.is_training = False
        self._stop_listening()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give back module and teacher: after an exception Lightning calls no ``teardown``."""
        self._random.interrupt()
        self._release(pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give back module and teacher."""
        self._release(pl_module)

    def training_step(
        self,
        pl_module: pl.LightningModule,
        user_step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the user's step; under automatic optimization, add the term to the loss it returns.

        Args:
            pl_module: The LightningModule that is trained.
            user_step: Its own ``training_step``.
            args: Positional arguments of the step.
            kwargs: Keyword arguments of the step.

        Returns:
            What the user's step returned, with the term added to the loss.

        Raises:
            CompressionError: If the step returned something without a loss, or never called the network.
        """
        # The tuner replaces the callbacks for a while: the first step may come before `on_fit_start`.
        tap = self._listen_to(pl_module)
        self._n_used_calls = 0
        self._batch = args[0] if args else next(iter(kwargs.values()), None)
        steps_before = pl_module.trainer.global_step
        with tap.recording():
            output = user_step(*args, **kwargs)
            if not pl_module.automatic_optimization:
                self._check_manual_step(pl_module, tap, steps_before)
                return output
            if output is None and self._task_loss:  # the user skips this batch
                return None
            loss = _loss_of(output) if self._task_loss else None
            term = self._term(pl_module, tap.calls())
        self._batch = self._index = None
        if term is None:
            raise CompressionError(
                f"No output of the network's forward in `training_step` of `{type(pl_module).__name__}` needs a "
                f"gradient, so there is nothing to distil into: call the network outside of `torch.no_grad()`."
            )
        total = term if loss is None else loss + term
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def manual_backward(
        self, pl_module: pl.LightningModule, user_backward: Callable[..., None], loss: Tensor, *args: Any, **kwargs: Any
    ) -> None:
        """Add the term of the network's calls since the last backward, under manual optimization.

        Args:
            pl_module: The LightningModule that is trained.
            user_backward: Its own ``manual_backward``.
            loss: The user's loss.
            *args: Further arguments of ``manual_backward``.
            **kwargs: Further arguments of ``manual_backward``.
        """
        self._saw_manual_backward = True
        calls = self._listen_to(pl_module).calls_so_far()
        # A second backward after one forward, as a GAN's, must not count the term twice.
        new_calls, self._n_used_calls = calls[self._n_used_calls :], len(calls)
        term = self._term(pl_module, new_calls)
        if term is not None:
            loss = loss + term if self._task_loss else term
        user_backward(loss, *args, **kwargs)

    def _term(self, pl_module: pl.LightningModule, calls: list[ForwardCall]) -> Tensor | None:
        """Return the mean term of the calls whose outputs need a gradient, or None where there are none."""
        learning = [call for call in calls if self._needs_gradient(call)]
        if not learning:
            return None
        self._begin_own_teachers(pl_module, learning[0].name)
        self._teacher.move_to(pl_module.device, _dtype_of(pl_module))
        losses = [self._at_this_step(pl_module.trainer, loss) for loss in self.losses]
        found = [self._terms(pl_module, call, losses) for call in learning]
        terms = [torch.stack(values).mean() for values in zip(*found, strict=True)]
        total = torch.stack([number(loss.weight) * term for loss, term in zip(losses, terms, strict=True)]).sum()
        values = {"distillation_loss": total}
        if len(terms) > 1:
            values |= dict(zip(self._learned.losses, terms, strict=True))
        batch_size = sum(_batch_size(call) for call in learning)
        for name, value in values.items():
            pl_module.log(f"compress/{name}", value.detach(), on_step=True, on_epoch=False, batch_size=batch_size)
        self._was_added = True
        return total

    def _begin_own_teachers(self, pl_module: pl.LightningModule, network: str) -> None:
        self._network = network
        waiting = [teacher for teacher in self._teacher.own if not teacher.has_begun]
        for teacher in waiting:
            teacher.begin(strip(copy_of(pl_module.get_submodule(network))))
        if self._teacher.own and network and not self._are_in_network:
            self._are_in_network = True
            self._pairs = [
                {mine: self._teacher.in_network(theirs, network) for mine, theirs in pairs.items()}
                for pairs in self._pairs
            ]
            self._tap_teachers()

    @property
    def _reads_output(self) -> bool:
        """Whether a loss compares what the networks return."""
        return not all(self._pairs)

    def _needs_gradient(self, call: ForwardCall) -> bool:
        if self._reads_output:
            return select_logits(call.output, self._output, "student").requires_grad
        return any(feature.requires_grad for features in call.features.values() for feature in features)

    def _at_this_step(self, trainer: pl.Trainer, loss: DistillationLoss) -> DistillationLoss:
        if not any(isinstance(value, Annealing) for value in vars(loss).values()):
            return loss
        if self._total_steps is None:
            self._total_steps = total_steps(trainer)
        return loss.at(completed_steps(trainer), self._total_steps)

    def _terms(
        self, pl_module: pl.LightningModule, call: ForwardCall, losses: Sequence[DistillationLoss]
    ) -> list[Tensor]:
        """Return the term of each loss, without its weight, for one call of the network."""
        select = self._teacher_logits if self._reads_output else None
        answer = self._kept.answer(call.args, call.kwargs, self._index, select, pl_module.device)
        student = select_logits(call.output, self._output, "student") if self._reads_output else None
        # Autocast would take the matrix products of the losses back to half precision.
        with torch.autocast(pl_module.device.type, enabled=False):
            return self._compared(pl_module, call, losses, answer, student)

    def _compared(
        self,
        pl_module: pl.LightningModule,
        call: ForwardCall,
        losses: Sequence[DistillationLoss],
        answer: Answer,
        student: Tensor | None,
    ) -> list[Tensor]:
        terms = []
        for name, loss, pairs in zip(self._learned.losses, losses, self._pairs, strict=True):
            labels = select_labels(self._batch, self._labels) if loss.needs_labels else None
            if not pairs:
                assert student is not None
                assert answer.output is not None
                terms.append(loss(*self._learned.adapted(name, student, answer.output, pl_module.trainer), labels))
                continue
            values = []
            for mine, theirs in pairs.items():
                both = call.features.get(mine, []), answer.features.get(theirs, [])
                _check_both_were_called(type(loss).__name__, mine, theirs, *both)
                for one, other in zip(*both, strict=True):
                    try:
                        pair = f"{name}: {mine} to {theirs}"
                        adapted = self._learned.adapted(pair, one, other, pl_module.trainer)
                        values.append(loss(*adapted, labels))
                    except ValueError as error:
                        raise self._not_comparable(error, loss, mine, theirs, call, pl_module) from error
            terms.append(torch.stack(values).mean())
        return terms

    def without_numbers(self, args: tuple[Any, ...], is_training: bool) -> tuple[Any, ...]:
        """Return the arguments of a hook with the user's own batch, before any hook of the user's has seen it.

        Args:
            args: Arguments whose first is the batch.
            is_training: Whether the next step is a training step, which needs the numbers of its samples.
        """
        if not args:
            return args
        batch, index = without_numbers(args[0])
        if is_training:
            self._index = index
        return batch, *args[1:]

    def _not_comparable(
        self,
        error: ValueError,
        loss: DistillationLoss,
        mine: str,
        theirs: str,
        call: ForwardCall,
        pl_module: pl.LightningModule,
    ) -> CompressionError:
        found = (
            output_shapes(pl_module.get_submodule(call.name), call.args, call.kwargs),
            self._teacher.shapes(call.args, call.kwargs),
        )
        shapes = [", ".join(f"`{name}` {shape}" for name, shape in of_network.items()) for of_network in found]
        return CompressionError(
            f"`{type(loss).__name__}` cannot compare the student's `{mine}` with the teacher's `{theirs}`: {error} "
            f"The student's modules return {shapes[0]}. The teacher's return {shapes[1]}."
        )

    def configure_optimizers(self, user_method: Callable[[], Any]) -> Any:
        """Give the adaptors that a checkpoint has brought to the user's first optimizer.

        Args:
            user_method: The module's own ``configure_optimizers``.
        """
        configured = user_method()
        self._learned.join(first_optimizer(configured))
        return configured

    def _teacher_logits(self, output: Any) -> Tensor:
        return select_logits(output, self._output, "teacher")

    def _check_manual_step(self, pl_module: pl.LightningModule, tap: ForwardTap, steps_before: int) -> None:
        """Check that an optimizer that has stepped had a gradient of the term, at least once in the fit."""
        if self._was_added or pl_module.trainer.global_step == steps_before:
            return
        if not self._saw_manual_backward:
            raise CompressionError(
                f"`training_step` of `{type(pl_module).__name__}` took an optimizer step without "
                f"`self.manual_backward(loss)`, where the distillation term is added: call it instead of "
                f"`loss.backward()`."
            )
        tap.calls()  # raises where the network is unknown

    def _listen_to(self, pl_module: pl.LightningModule) -> ForwardTap:
        if self._tap is None:
            self._tap = ForwardTap(pl_module, self._module, [name for pairs in self._pairs for name in pairs])
        return self._tap

    def _stop_listening(self) -> None:
        if self._tap is not None:
            self._tap.remove()
            self._tap = None

    def _release(self, pl_module: pl.LightningModule) -> None:
        self._stop_listening()
        leave_methods(self._wrappers)
        self._wrappers = []
        self._batch = self._index = None
        self._teacher.release()


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if isinstance(loss, Tensor):
        return loss
    if not isinstance(output, Mapping):
        came = f"a {type(output).__name__}"
    elif "loss" in output:
        came = f"a {type(loss).__name__} under the key 'loss'"
    else:
        came = f"a dict with the keys {', '.join(repr(key) for key in output) or 'none'}"
    raise CompressionError(
        f"`training_step` returned {came}, but knowledge distillation adds to a loss: "
        f"return a tensor, a dict with a tensor under the key 'loss', or None to skip the batch."
    )


def _checked_losses(
    losses: Sequence[DistillationLoss] | None, temperature: float | None, weight: float | None
) -> tuple[DistillationLoss, ...]:
    if losses is None:
        default = LogitDistillation()
        return (
            LogitDistillation(
                temperature=default.temperature if temperature is None else temperature,
                weight=default.weight if weight is None else weight,
            ),
        )
    if temperature is not None or weight is not None:
        raise ValueError(
            "`temperature` and `weight` are those of the one loss that there is without `losses`. Give them to the "
            "losses: `losses=[LogitDistillation(temperature=4.0, weight=0.7)]`."
        )
    if isinstance(losses, DistillationLoss) or not losses:
        raise ValueError(f"`losses` must be a list of at least one distillation loss, got {losses!r}.")
    for loss in losses:
        if not isinstance(loss, DistillationLoss):
            raise TypeError(f"`losses` must hold distillation losses, got {type(loss).__name__}.")
    return tuple(losses)


def _unique_names(losses: Sequence[DistillationLoss]) -> list[str]:
    """Return a name for each loss, made of that of its class; a second one of a class is numbered."""
    names = [re.sub(r"(?<!^)(?=[A-Z])", "_", type(loss).__name__).lower() for loss in losses]
    counts = [names[:index].count(name) for index, name in enumerate(names)]
    return [f"{name}_{count + 1}" if count else name for name, count in zip(names, counts, strict=True)]


def _located(name: str, modules: Mapping[str, str]) -> str:
    """Return the name of a module of the LightningModule, of one that may be given as that of its network."""
    module, key = split_name(name)
    return modules[module] if key is None else f"{modules[module]}[{key}]"


def _check_both_were_called(
    loss: str, mine: str, theirs: str, student: Sequence[Tensor], teacher: Sequence[Tensor]
) -> None:
    if not student or len(student) != len(teacher):
        raise CompressionError(
            f"`{loss}` pairs the student's `{mine}`, which one forward calls {len(student)} times, with the teacher's "
            f"`{theirs}`, which it calls {len(teacher)} times. Name modules that are called, as often in both networks."
        )


def _batch_size(call: ForwardCall) -> int:
    tensors = [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
    return len(tensors[0]) if tensors else 1


def _dtype_of(pl_module: pl.LightningModule) -> torch.dtype:
    """Return the floating-point type of the parameters; the module's own ``dtype`` misses casts of its children."""
    dtypes = (parameter.dtype for parameter in pl_module.parameters() if parameter.is_floating_point())
    return next(dtypes, torch.float32)
