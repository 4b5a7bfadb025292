"""The wrapped network: sites, and the verbs record, measure and clamp at them."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .clamp import Clamp, When
from .clamping import ActiveClamp, ClampContext
from .errors import SiteError, TextError, nearest
from .families import family_of
from .plain import module_sites
from .prove import probe_inputs, prove
from .resolve import Resolver
from .run import Run, track
from .sites import MODULE_PREFIX, Site, SiteTable
from .structure import structural_sites
from .taps import Kind, Point, Tap, TapSet

if TYPE_CHECKING:
    from .fold import Fold
    from .generate import Generation
    from .measure import MeasureTable
    from .recording import Recording
    from .text import Text


# What transformers calls tables of learned positions.
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|positions_embed|position_embeddings?)$")


class Model:
    """A network with named sites. The module that it wraps is never rewritten, copied or subclassed.

    Args:
        module: any ``nn.Module``; transformers models get the sites of their family, others those of their modules.
        tokenizer: a transformers tokenizer, for text inputs.
        name: what to call it in reports.
        example: positional or keyword arguments of a forward, to prove sites of modules whose inputs are not known.

    Attributes:
        module, tokenizer, name: as given.
        forward_names: the arguments that its forward takes by name.
        family: name of the family-table row, ``"structural"`` when the usual shape was found, or ``"module"``.

    Example:
        >>> import actome as ac
        >>> model = ac.demo()
        >>> model.record("The cat sat on", "blocks.*.resid.post")["blocks.0.resid.post"].shape[-1] == model.d_model
        True
    """

    def __init__(self, module: nn.Module, tokenizer: Any = None, name: str | None = None, example: Any = None):
        if not isinstance(module, nn.Module):
            raise TypeError(f"wrap() takes an nn.Module, not {type(module).__name__}")
        self.module = module
        self.tokenizer = tokenizer
        self.name = name or type(module).__name__
        self.example = example
        self.run = Run()
        self.clamped: list[ClampContext] = []
        self._tracked = 0
        self._tracker: Any = None
        self._plain: dict[str, Site] = {}
        self._matches: dict[Any, tuple[Site, ...]] = {}
        self.plans: dict[tuple[Site, ...], Any] = {}
        self._weight = next(module.parameters(), None)
        signature = inspect.signature(module.forward).parameters
        self.forward_names = set(signature)
        self._open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.values())

    # -- what there is ------------------------------------------------------------------------------------------

    @cached_property
    def _resolved(self) -> tuple[str, SiteTable]:
        """The family's name and the proved sites; made by one small forward when first asked for."""
        family = family_of(getattr(self.module, "config", None))
        if family is not None:
            sites = Resolver(self.module, family, self.run).sites()
            if sites:
                table = prove(self.module, sites, self.run, self._probe())
                if len(table):
                    return family.name, table
        try:
            inputs = self._probe()
        except (SiteError, AttributeError):
            return "module", SiteTable()
        table = structural_sites(self.module, self.run, inputs)
        return ("structural" if len(table) else "module"), table

    @property
    def family(self) -> str:
        return self._resolved[0]

    @property
    def table(self) -> SiteTable:
        return self._resolved[1]

    @cached_property
    def order(self) -> dict[str, int]:
        """Rank of every named site in the order of the forward."""
        return {site.name: i for i, site in enumerate(self.table)}

    def _probe(self) -> dict[str, Any]:
        if isinstance(self.example, Mapping):
            return dict(self.example)
        if self.example is not None:
            names = list(inspect.signature(self.module.forward).parameters)
            values = self.example if isinstance(self.example, tuple) else (self.example,)
            return dict(zip(names, values, strict=False))
        return probe_inputs(self.module)

    def sites(self, pattern: str | None = None) -> SiteTable:
        """What can be reached: all named sites, or those that a pattern selects.

        Args:
            pattern: a site's name with ``*`` (one part of a name), ``{a..b}`` and ``{x,y}``;
                ``module:PATH`` for the output of any submodule, ``module:PATH@in`` for its input.

        Returns:
            Sites in the order in which the forward reaches them; each has name, dims, sizes, layer.

        Raises:
            SiteError: nothing matches; names the nearest.
        """
        if pattern is None:
            return (
                self.table
                if len(self.table)
                else SiteTable(module_sites(self.module, f"{MODULE_PREFIX}*", self._plain))
            )
        return SiteTable(self.match(pattern))

    def match(self, patterns: str | Sequence[str]) -> tuple[Site, ...]:
        """The sites that one or several patterns select, each once, as a tuple."""
        key = patterns if isinstance(patterns, str) else tuple(patterns)
        if key not in self._matches:
            found: dict[str, Site] = {}
            for pattern in (key,) if isinstance(key, str) else key:
                for site in self._match_one(pattern):
                    found[site.name] = site
            if not found:
                raise SiteError("no site was asked for; give a name or a pattern such as 'blocks.*.resid.post'")
            self._matches[key] = tuple(found.values())
        return self._matches[key]

    def _match_one(self, pattern: str) -> tuple[Site, ...]:
        if not isinstance(pattern, str):
            raise SiteError(f"a site is named by a string, not {type(pattern).__name__}")
        if pattern.startswith(MODULE_PREFIX):
            return tuple(module_sites(self.module, pattern, self._plain))
        if not len(self.table):
            names = [name for name, _ in self.module.named_modules() if name]
            raise SiteError(
                f"{self.name} has no named sites, only those of its modules, as {MODULE_PREFIX}PATH"
                + nearest(pattern, names)
            )
        return self.table.match(pattern)

    @property
    def config(self) -> Any:
        return getattr(self.module, "config", None)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self._weight is None else self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        for site in self.table:
            if site.size("d_model"):
                return int(site.size("d_model"))  # type: ignore[arg-type]
        raise SiteError(f"{self.name} has no residual stream")

    @property
    def layers(self) -> int:
        """How many blocks there are (the larger stack's, in an encoder-decoder)."""
        return 1 + max((site.layer for site in self.table if site.layer is not None), default=-1)

    @property
    def context(self) -> int | None:
        """Longest sequence that the model's positions allow, as far as its configuration says."""
        text = getattr(self.config, "text_config", self.config)
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length"):
            size = getattr(text, name, None)
            if isinstance(size, int) and size > 0:
                # RoBERTa counts its positions from the padding index on.
                return size - 2 if getattr(text, "model_type", "") in ("roberta", "xlm-roberta") else size
        return None

    @property
    def info(self) -> dict[str, Any]:
        """Facts for a report: name, family, class, parameters, dtype, device, layers, d_model, heads, vocabulary."""
        facts: dict[str, Any] = {
            "name": self.name,
            "family": self.family,
            "class": type(self.module).__name__,
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "layers": self.layers or None,
            "context": self.context,
        }
        for site in self.table:
            for dim in ("d_model", "head", "kv_head", "d_mlp", "expert", "vocab"):
                if site.size(dim):
                    facts.setdefault(dim, site.size(dim))
        return {key: value for key, value in facts.items() if value is not None}

    def __repr__(self) -> str:
        return f"Model({self.name}, {type(self.module).__name__}, {len(self.table)} sites)"

    # -- running it ---------------------------------------------------------------------------------------------

    def __call__(self, inputs: Any = None, /, *args: Any, **kwargs: Any) -> Any:
        """Plain call-through: what the module returns for the same arguments; text is tokenised first."""
        if inputs is None:
            return self.module(*args, **kwargs)
        if isinstance(inputs, str) or (isinstance(inputs, list) and inputs and isinstance(inputs[0], str)):
            return self.module(*args, **self.arguments(inputs)[0], **kwargs)
        return self.module(inputs, *args, **kwargs)

    def logits(self, inputs: Any, grad: bool = False) -> Tensor:
        """The model's logits.

        Args:
            inputs: text, a list of texts, token ids (pos) or (batch, pos), or a dict of forward arguments.
            grad: keep the graph for a backward pass.

        Returns:
            (batch, pos, vocab), or (batch, class) for a classifier. Given text, an encoder-decoder's decoder reads the
            same text behind its start token. Rows shorter than the longest are padded on the
            right; their logits beyond the text mean nothing.
        """
        arguments, _, _ = self.arguments(inputs)
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            out = self.module(**arguments)
        logits = getattr(out, "logits", None)
        if logits is None:
            if isinstance(out, Tensor):
                return out
            raise SiteError(f"{type(self.module).__name__} gives no logits; load the class with a head")
        return logits

    def read(self, texts: str | Sequence[str], batch_size: int) -> Text:
        """One or several texts as rows of their own, split where they are longer than the model's context."""
        from .text import Text

        texts = [texts] if isinstance(texts, str) else texts
        return Text(texts, self.tokenizer, context=self.context, batch_size=batch_size, pack=False)

    def arguments(self, inputs: Any, padding: str = "right") -> tuple[dict[str, Any], Tensor | None, Tensor | None]:
        """Forward arguments for any kind of input, with the token ids and the mask (``None`` when nothing is padded).

        Args:
            inputs: text, list of texts, ids, a dict of arguments, or a `Batch`.
            padding: which side padding goes to.
        """
        if isinstance(inputs, Mapping):
            ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
            mask = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
            padded = mask is not None and ids is not None and mask.shape == ids.shape and not bool(mask.all())
            return dict(inputs), ids, mask.bool() if padded else None
        if isinstance(inputs, Tensor) and inputs.is_floating_point():
            name = getattr(self.module, "main_input_name", None) or next(iter(self.forward_names))
            return {name: inputs}, None, None
        if hasattr(inputs, "ids"):
            batch = inputs
        elif isinstance(inputs, Tensor):
            # Ids that are already a tensor: the path of every loop, so nothing else is looked at.
            if inputs.dtype not in (torch.int64, torch.int32) or inputs.ndim not in (1, 2) or not inputs.numel():
                shape = f"{inputs.dtype} {tuple(inputs.shape)}"
                raise TextError(
                    f"token ids are integers of shape (pos) or (batch, pos), one token at least, not {shape}"
                )
            ids = inputs if inputs.ndim == 2 else inputs[None]
            self.check_ids(ids)
            self.check_length(ids.shape[1])
            return self._text_arguments(ids.to(self.device), None), ids, None
        else:
            from .tokens import encode

            batch = encode(inputs, self.tokenizer)
        self.check_ids(batch.ids)
        self.check_length(batch.ids.shape[1])
        ids = batch.ids.to(self.device)
        mask = batch.mask.to(self.device) if batch.mask is not None else None
        if mask is not None and padding == "left":
            ids, mask = _pad_left(ids, mask)
        return self._text_arguments(ids, mask), ids, mask

    def check_ids(self, ids: Tensor, what: str = "token id") -> None:
        """Refuses ids that the embedding does not have. On a device they are not looked at, since that would wait.

        Raises:
            TextError: an id that the model does not know; `what` says what it was given as.
        """
        if ids.device.type != "cpu" or self._vocabulary is None or not ids.numel():
            return
        low, high = ids.aminmax()
        if int(low) < 0 or int(high) >= self._vocabulary:
            wrong = int(low) if int(low) < 0 else int(high)
            raise TextError(f"{what} {wrong} is not among the {self._vocabulary:,} that {self.name} knows")

    @cached_property
    def _vocabulary(self) -> int | None:
        """How many token ids the model knows, where that can be seen."""
        try:
            return getattr(self.module.get_input_embeddings(), "num_embeddings", None)
        except (AttributeError, NotImplementedError):
            return None

    def check_length(self, length: int) -> None:
        """Refuses what is longer than a table of learned positions; where positions are computed, any length is read.

        Raises:
            TextError: more tokens than there are positions.
        """
        if self._positions is not None and length > self._positions:
            raise TextError(f"{length} tokens are more than the {self._positions} that {self.name} has positions for")

    @cached_property
    def _positions(self) -> int | None:
        """How many positions the model has learned, where they are a table of about the length of its context."""
        size = self.context
        if size is None:
            return None
        tables = (part for name, part in self.module.named_modules() if _POSITIONS.search(name))
        known = any(size <= getattr(part, "num_embeddings", -1) <= size + 2 for part in tables)
        return size if known else None

    def _text_arguments(self, ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if "input_ids" not in self.forward_names and not self._open_ended:
            return {next(iter(self.forward_names)): ids}
        arguments["input_ids"] = ids
        if mask is not None:
            arguments["attention_mask"] = mask.long()
            if "position_ids" in self.forward_names and not bool(mask[:, 0].all()):
                # Padding on the left must not count as positions.
                arguments["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp_min(0)
        if "use_cache" in self.forward_names:
            arguments["use_cache"] = False
        if "decoder_input_ids" in self.forward_names:
            start = getattr(self.config, "decoder_start_token_id", None)
            start = start if start is not None else getattr(self.config, "pad_token_id", 0) or 0
            # The decoder reads the same text one step later, so that its sites have a position for every token.
            first = torch.full((len(ids), 1), start, dtype=ids.dtype, device=ids.device)
            arguments["decoder_input_ids"] = torch.cat([first, ids[:, :-1]], dim=1)
            if mask is not None and "decoder_attention_mask" in self.forward_names:
                arguments["decoder_attention_mask"] = mask.long()
        return arguments

    # -- taps ---------------------------------------------------------------------------------------------------

    def tap(self, taps: list[tuple[Point, Tap, Kind]], track: bool = False) -> Tapped:
        """Installs taps for the time of a block: the way in for code that needs more than the three verbs.

        Args:
            taps: (point, function, ``"read"`` | ``"write"`` | ``"keep"``); a point is a site's `address`.
            track: also keep `run` (positions, phase, step, mask) up to date.
        """
        return Tapped(self, taps, track)

    def start_tracking(self) -> None:
        if not self._tracked:
            self.run.reset()
            self._tracker = track(self.module, self.run)
        self._tracked += 1

    def stop_tracking(self) -> None:
        self._tracked -= 1
        if not self._tracked:
            self._tracker.remove()
            self._tracker = None

    def before(self, name: str, site: Site) -> Site:
        """The one site of this name, proved to be reached before another one that depends on it."""
        (found,) = self.match(name)
        order = self.order
        if site.name in order and found.name in order and order[found.name] >= order[site.name]:
            raise SiteError(
                f"{found.name} is reached after {site.name}, which depends on it; condition on an earlier one"
            )
        return found

    def condition_taps(self, when: When, clamp: ActiveClamp) -> list[tuple[Point, Tap, Kind]]:
        """The taps that evaluate a clamp's condition; the sites of the condition must come before the clamp's."""
        parts = when.parts
        flags: list[Tensor | None] = [None] * len(parts)

        def tap(i: int) -> tuple[Point, Tap, Kind]:
            site = self.before(parts[i].site, clamp.site)

            def evaluate(x: Tensor) -> None:
                known = clamp.condition
                if when.latch and self.run.step and known is not None and known.ndim and len(known) == len(x):
                    return
                mask = self.run.mask
                here = None if mask is None or x.ndim < 2 or mask.shape[0] != len(x) else mask[:, -x.shape[1] :]
                flag = parts[i].holds(x, here)
                if flag.dtype != torch.bool:
                    raise SiteError(f"the condition at {site.name} gave {flag.dtype}; it must give bools")
                flags[i] = flag
                if all(one is not None for one in flags):
                    found = when.combine(tuple(flags))  # type: ignore[arg-type]
                    # What a prompt was like, position by position, has no meaning for the tokens that come after it.
                    clamp.condition = found.any(1) if when.latch and found.ndim > 1 else found
                    flags[:] = [None] * len(flags)

            return site.address, evaluate, "read"

        return [tap(i) for i in range(len(parts))]

    # -- the verbs ----------------------------------------------------------------------------------------------

    def clamp(self, *clamps: Clamp, strict: bool = True) -> ClampContext:
        """Changes activations for the time of a ``with`` block, in inference and in training, with gradients.

        Args:
            clamps: one or several; at one site they work in the order in which they are given.
            strict: whether a clamp that never fired is an error. A loop of one's own that enters the same context for
                each forward takes False, and looks at ``fired`` when it is through.

        Returns:
            A context manager; its value counts how often each clamp fired.

        Raises:
            SiteError: a site that does not exist.
            ClampError: on entering, a clamp that does not fit; on leaving, a clamp that never fired.

        Example:
            >>> import actome as ac
            >>> model = ac.demo()
            >>> with model.clamp(ac.Ablate("blocks.1.mlp.out", "zero")) as active:
            ...     without = model.logits("The value of the")
            >>> active.fired
            1
        """
        return ClampContext(self, clamps, strict)

    def record(self, inputs: Any, sites: str | Sequence[str], **options: Any) -> Recording:
        """Brings activations out of the model; see `actome.core.record.record` for every option."""
        from .record import record

        return record(self, inputs, sites, **options)

    def measure(self, inputs: Any, measures: Any, **options: Any) -> MeasureTable:
        """Folds the stream of activations into statistics; see `actome.core.stream.measure`."""
        from .stream import measure

        return measure(self, inputs, measures, **options)

    def fold(self, batches: Any, folds: Any, **options: Any) -> dict[str, Fold]:
        """Folds activations together with labels or other companions; see `actome.core.labelled.fold`."""
        from .labelled import fold

        return fold(self, batches, folds, **options)

    def generate(self, prompt: Any, max_new_tokens: int = 20, **options: Any) -> Generation:
        """Generates with the key-value cache, under whatever clamps are active; see `actome.core.generate.generate`."""
        from .generate import generate

        return generate(self, prompt, max_new_tokens=max_new_tokens, **options)


def _pad_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    rows = [row.roll(int((~real).sum())) for row, real in zip(ids, mask, strict=True)]
    return torch.stack(rows), mask.flip(1)


class Tapped(TapSet):
    """Taps of one model, with what they need meanwhile: the state of the run, and compiled code run eagerly."""

    __slots__ = ("_model", "_stance", "_track")

    def __init__(self, model: Model, taps: list[tuple[Point, Tap, Kind]], track: bool):
        super().__init__(taps)
        self._model = model
        self._track = track or any(point.needs_tokens for point, _, _ in taps)
        self._stance: Any = None

    def __enter__(self) -> Tapped:
        if self._track:
            self._model.start_tracking()
        # Compiled code ignores hooks that came after it. Without dynamo nothing can have been compiled.
        if "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")
            self._stance.__enter__()
        try:
            super().__enter__()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__()
        self._leave()

    def _leave(self) -> None:
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None
        if self._track:
            self._model.stop_tracking()
