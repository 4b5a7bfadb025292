"""`actome steer`: fit a clamp to examples, judge it, try it, ship it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actome.cli.common import (
    UsageError,
    add_command,
    add_model_options,
    make_room,
    number,
    open_model,
    positive,
    shows_progress,
    whole,
)
from actome.core.errors import nearest_beside

if TYPE_CHECKING:
    from actome.core.clamp import Clamp
    from actome.core.model import Model
    from actome.steer import Evaluation

# Said again here, since the estimators are imported only when run.
_SPLITS = ("split", "split-lora", "split-weight")
_METHODS = ("means", "lda", "pca", "logistic", "transport", "transport-mean", "transport-gaussian", *_SPLITS)
_OVERS = ("last", "mean", "response", "prompt")
_PLACINGS = ("all", "prompt", "last", "response")


def add_parser(commands: argparse._SubParsersAction) -> None:
    steer = commands.add_parser(
        "steer", help="fit, judge, try and ship clamps", description="Fits, judges, tries and ships clamps."
    )
    steer.set_defaults(command="steer")
    parts = steer.add_subparsers(title="commands", metavar="COMMAND", required=True)

    fit = _part(parts, "fit", _fit, "a clamp from two sets of examples")
    forms = "one a line, or .jsonl with prompt and response"
    fit.add_argument("--positive", metavar="FILE", help=f"examples that it should lead to: {forms}")
    fit.add_argument("--negative", metavar="FILE", help="examples that it should lead away from")
    fit.add_argument("--pairs", metavar="FILE", help="for split: .jsonl with prompt, wanted and unwanted")
    fit.add_argument("--sites", default="blocks.*.resid.post", metavar="PATTERN", help="default: %(default)s")
    fit.add_argument("--method", default="means", choices=_METHODS, help="default: %(default)s")
    fit.add_argument("--over", default="last", choices=_OVERS, help="tokens of an example; default: %(default)s")
    fit.add_argument("--only", metavar="FILE", help="with --except: steer prompts that are like these")
    fit.add_argument("--except", dest="others", metavar="FILE", help="prompts that are to be left alone")
    fit.add_argument("--out", required=True, metavar="FOLDER", help="where to save the clamp")
    fit.add_argument("--overwrite", action="store_true", help="replace a clamp that lies there")

    judge = _part(parts, "eval", _eval, "effect against damage over strengths, with controls")
    _clamp_option(judge)
    judge.add_argument("--pairs", required=True, metavar="FILE", help=".jsonl with prompt, wanted and unwanted")
    judge.add_argument("--text", metavar="FILE", help="held-out text, one document a line, whose loss must not rise")
    judge.add_argument("--task", metavar="FILE", help=".jsonl with prompt, answers, right; must not suffer")
    judge.add_argument("--strengths", default="-1,0.5,1,1.5,2,3,4", metavar="A,B,...", help="default: %(default)s")
    judge.add_argument("--sites", metavar="PATTERN", help="try it at these sites, of those where it was fitted")
    judge.add_argument(
        "--positions", default="all", metavar="A,B,...", help=f"try it at these tokens: {', '.join(_PLACINGS)}"
    )
    judge.add_argument(
        "--positive", metavar="FILE", help="with --negative, what it was fitted to; shuffled as a control"
    )
    judge.add_argument("--negative", metavar="FILE", help="see --positive")
    judge.add_argument("--random", type=whole, default=5, metavar="N", help="random directions; default 5")
    judge.add_argument("--per-token", action="store_true", help="compare nats a token, for long responses")
    judge.add_argument("--json", metavar="FILE", help="write the curves; - is standard output")
    judge.add_argument("--html", metavar="FILE", help="write a page with the curves")

    apply = _part(parts, "apply", _apply, "generate with and without a clamp")
    _clamp_option(apply)
    apply.add_argument("--prompt", required=True, action="append", metavar="TEXT", help="may be repeated")
    apply.add_argument("--scale", type=number, default=1.0, help="multiplies the clamp's strength; default 1")
    apply.add_argument("--new-tokens", type=positive, default=40, metavar="N", help="default 40")

    export = _part(parts, "export", _export, "a constant clamp as a control vector, or in the weights of a checkpoint")
    _clamp_option(export)
    export.add_argument("--scale", type=number, default=1.0, help="multiplies the clamp's strength; default 1")
    export.add_argument("--gguf", metavar="FILE", help="write a GGUF control vector")
    export.add_argument("--checkpoint", metavar="FOLDER", help="write a plain Hugging Face checkpoint")


def _part(parts: argparse._SubParsersAction, name: str, run, help: str) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    def checked(args: argparse.Namespace) -> int:
        _check_files(args)
        return run(args)

    parser = add_command(parts, name, checked, help, help[0].upper() + help[1:] + ".")
    parser.set_defaults(command=f"steer {name}")
    parser.add_argument("model", metavar="MODEL", help="folder, hub id, or demo")
    add_model_options(parser)
    return parser


def _check_files(args: argparse.Namespace) -> None:
    """A file that is missing is bad usage, as with the other commands, and is said before a model is loaded."""
    for name in ("positive", "negative", "only", "others", "pairs", "text", "task"):
        path = getattr(args, name, None)
        if path is not None and not Path(path).exists():
            raise UsageError(f"there is no file {path}{nearest_beside(Path(path))}")


def _clamp_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clamp", required=True, metavar="FOLDER", help="as steer fit saved it, or a .gguf file")


def _fit(args: argparse.Namespace) -> int:
    from actome.clamps import save_clamps
    from actome.core.clamp import Clamp
    from actome.steer import Condition, Steering, when
    from actome.steer.conditions import before
    from actome.steer.files import read_examples

    if (args.only is None) != (args.others is None):
        raise UsageError("a condition needs both --only and --except")
    data = _data(args)
    prompts = None if args.only is None else (read_examples(args.only), read_examples(args.others))
    model = open_model(args)
    how = {"method": args.method, "over": args.over, "sites": args.sites}
    clamp = _estimator(how).fit(model, data)
    known = getattr(clamp, "about", None) or {}
    condition = None
    if prompts is not None:
        some = [clamp] if isinstance(clamp, Clamp) else list(clamp)
        condition = Condition(before(model, args.sites, some[0].site)).fit(model, *prompts)
        clamp = when(clamp, condition) if isinstance(clamp, Clamp) else [when(one, condition) for one in some]
    folder = save_clamps(args.out, clamp, model=model, about={**known, **how}, overwrite=args.overwrite)
    if not args.quiet:
        if isinstance(clamp, Steering):
            print(clamp.table.to_string(index=False, float_format="%.3f"))
            print(f"chosen: {clamp.site}, the best separation of examples that were not fitted on")
        else:
            some = [clamp] if isinstance(clamp, Clamp) else clamp
            print(f"fitted: {', '.join(f'{type(one).__name__} at {one.site}' for one in some)}")
        if condition is not None:
            side = "above" if condition.above else "below"
            print(f"only if: similarity {side} {condition.threshold:.3f} at {condition.site}, F1 {condition.f1:.3f}")
        print(f"written: {folder}")
    return 0


def _data(args: argparse.Namespace) -> Any:
    """What a method is fitted to: two sets of examples, or pairs of responses."""
    from actome.steer import Examples
    from actome.steer.files import read_examples, read_pairs

    if args.method in _SPLITS:
        if args.pairs is None:
            raise UsageError(f"--method {args.method} is trained on --pairs")
        return read_pairs(args.pairs)
    if args.positive is None or args.negative is None:
        raise UsageError(f"--method {args.method} takes two sets of examples, --positive and --negative")
    return Examples(read_examples(args.positive), read_examples(args.negative))


def _eval(args: argparse.Namespace) -> int:
    from actome.steer import Examples, evaluate
    from actome.steer.files import how_fitted, read_choices, read_examples, read_pairs

    strengths = _numbers(args.strengths)
    if (args.positive is None) != (args.negative is None):
        raise UsageError("the control with shuffled labels needs both --positive and --negative")
    pairs = read_pairs(args.pairs)
    text = None if args.text is None else read_examples(args.text)
    task = None if args.task is None else read_choices(args.task)
    data = None
    if args.positive is not None:
        data = Examples(read_examples(args.positive), read_examples(args.negative))
    out = None if args.json == "-" else make_room(args.json)
    page = make_room(args.html)
    model = open_model(args)
    clamps = _clamps(args, model)
    sites = None if args.sites is None else [site.name for site in model.match(args.sites)]
    found = evaluate(
        model,
        clamps,
        pairs,
        text=text,
        task=task,
        strengths=strengths,
        sites=sites,
        positions=args.positions.split(","),
        estimator=None if data is None else _estimator(how_fitted(args.clamp)),
        data=data,
        random=args.random,
        per_token=args.per_token,
        progress=shows_progress(args),
    )
    if page:
        from actome.report.steering_page import steering_page

        steering_page(found, str(args.clamp)).save_html(page)
    written = _judged_as_json(found) if args.json else ""
    if out:
        out.write_text(written, encoding="utf-8")
    elif args.json:
        sys.stdout.write(written)
    if not args.quiet and args.json != "-":
        _print_judged(found)
        for path in filter(None, (out, page)):
            print(f"written: {path}")
    return 0


def _estimator(how: Mapping[str, Any]) -> Any:
    """What `actome steer fit` fits with, by what it keeps beside a clamp."""
    from actome.steer import SPLIT, ActivationTransport, Contrast

    method = how["method"]
    if method in _SPLITS:
        return SPLIT(how["sites"], form=method.partition("-")[2] or "vector", per_token=True)
    if method.startswith("transport"):
        return ActivationTransport(how["sites"], kind=method.partition("-")[2] or "linear", over=how["over"])
    return Contrast(how["sites"], method, how["over"])


def _judged_as_json(found: Evaluation) -> str:
    from actome.report.plain import strict

    data = {
        "site": found.site,
        "positions": found.positions,
        "strength": found.strength,
        "why": found.why,
        "collapsed": found.collapsed.to_dict("records"),
        "held_out": found.held_out,
        "samples": found.samples,
        "about": found.about,
        "rows": json.loads(found.frame.to_json(orient="records")),
    }
    return json.dumps(strict(data), indent=1, allow_nan=False) + "\n"


def _print_judged(found: Evaluation) -> None:
    places = found.frame[["site", "positions"]].drop_duplicates()
    index = [*(("site", "positions") if len(places) > 1 else ()), "arm", "strength"]
    print(found.frame.pivot_table(index=index, columns="measure", values="value").to_string(float_format="%.3f"))
    for row in found.collapsed.to_dict("records"):
        print(f"comes apart: strength {row['strength']:g} at {row['site']} ({row['positions']})")
    if found.strength is None:
        print(f"recommended: nothing ({found.why})")
        return
    print(f"recommended: strength {found.strength:g} at {found.site}, {found.positions} ({found.why})")
    mean, low, high = found.held_out["gain"]
    words = [f"{mean:+.2f} nats ({low:+.2f} to {high:+.2f})"]
    for key, name in (("random_gains", "random direction"), ("shuffled_gains", "of shuffled labels")):
        if found.held_out[key]:
            words.append(f"best {name} {max(found.held_out[key]):+.2f}")
    print(f"on pairs held out: {'; '.join(words)}")


def _apply(args: argparse.Namespace) -> int:
    from actome.steer.preference import scaled

    model = open_model(args)
    clamps = [one if args.scale == 1.0 else scaled(one, args.scale) for one in _clamps(args, model)]
    for prompt in args.prompt:
        bare = str(model.generate(prompt, max_new_tokens=args.new_tokens))
        with model.clamp(*clamps):
            steered = str(model.generate(prompt, max_new_tokens=args.new_tokens))
        print(f"{prompt!r}\n  without: {bare!r}\n  with:    {steered!r}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from actome.steer import bake, to_gguf
    from actome.steer.preference import scaled

    if args.gguf is None and args.checkpoint is None:
        raise UsageError("say what to write: --gguf FILE, --checkpoint FOLDER, or both")
    if args.checkpoint is not None and Path(args.checkpoint).resolve() == Path(args.model).resolve():
        raise UsageError(
            f"--checkpoint {args.checkpoint} is the model itself, which would be lost; name another folder"
        )
    gguf = make_room(args.gguf)
    model = open_model(args)
    clamps = [one if args.scale == 1.0 else scaled(one, args.scale) for one in _clamps(args, model)]
    if gguf is not None:
        print(f"written: {to_gguf(gguf, model, clamps)}")
    if args.checkpoint is not None:
        baked = bake(model, clamps)
        folder = baked.save(args.checkpoint, model.tokenizer)
        print(
            f"written: {folder}; its logits differ from the clamped model's by {baked.difference:.1e} of their spread"
        )
    return 0


def _clamps(args: argparse.Namespace, model: Model) -> list[Clamp]:
    from actome.steer.files import read_clamps

    return read_clamps(args.clamp, model)


def _numbers(words: str) -> list[float]:
    try:
        return [float(word) for word in words.split(",")]
    except ValueError:
        raise UsageError(f"--strengths {words!r}: numbers with commas between them") from None
