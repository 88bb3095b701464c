"""Chat templates: Jinja from a model's folder, rendered within limits.

Jinja's sandbox keeps a template from reaching Python, but not from looping forever or building
texts that fill the memory. Here every loop, call, filter and operator is charged to a budget that
no conversation needs in full. No clock is involved, so results are reproducible.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Some templates print today's date; prompts must not change from day to day.
_TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
# Limits per rendering: steps (loops, calls, operators), and the characters or elements they handle.
_MOST_STEPS, _MOST_HANDLED = 500_000, 2**28
# A list element costs as much as this many characters.
_ELEMENT = 64
# Largest number a template may ask for: a width, a count, an exponent.
_LARGEST_NUMBER = 100_000
_WIDE = re.compile(r"[0-9]{5}")
# Filters whose result grows with the product of their inputs, and filters that never read texts.
_MULTIPLYING = frozenset({"replace", "join", "indent", "center", "wordwrap", "batch", "slice"})
_PASSING = frozenset(
    "attr batch count d default dictsort first groupby items last length list map max min reject "
    "rejectattr reverse select selectattr slice sort sum unique".split()
)
# Tests and filters of what may be undefined.
_ASKING = frozenset({"defined", "undefined", "none", "default", "d"})


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text; here it is just passed through."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, with everything that can grow charged to a budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%", "-", "/", "//"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
            optimized=False,  # would evaluate constants before they are charged
        )
        self.steps = self.handled = self.length = 0
        self.filters["tojson"] = _to_json
        kinds: tuple[dict[str, Any], ...] = (self.filters, self.tests)
        for kind in kinds:
            for name, function in kind.items():
                kind[name] = _paid(self, name, function)
        self.filters["_loop"] = self._loop
        self.filters["_made"] = self.pay
        self.filters["_shown"] = lambda value: self.pay(value, whole=True)
        self.globals.update(raise_exception=_raise_exception, strftime_now=template_date)
        self.globals.pop("lipsum", None)

    def start(self, length: int = 0) -> None:
        """Reset the budget; `length` is the number of template characters a macro may repeat."""
        self.steps = self.handled = 0
        self.length = length

    def pay(self, value: Any, whole: bool = False) -> Any:
        """Charge for a value and return it; `whole` includes its texts, as printing does."""
        self.steps += 1
        self.handled += self._size(value, whole)
        if self.steps > _MOST_STEPS or self.handled > _MOST_HANDLED:
            raise jinja2.TemplateError("it takes more steps or memory than any conversation needs")
        return value

    def _size(self, value: Any, whole: bool) -> int:
        if isinstance(value, str | bytes):
            return len(value)
        if isinstance(value, int):
            return value.bit_length() // 8
        size, open_values = 0, [value]
        while open_values and self.handled + size <= _MOST_HANDLED:
            one = open_values.pop()
            if isinstance(one, str | bytes):
                size += len(one) if whole else 0
            elif isinstance(one, Mapping):
                open_values += [part for pair in one.items() for part in pair]
            elif isinstance(one, list | tuple | set | frozenset):
                open_values += one
            size += _ELEMENT
        return size

    def ask(self, arguments: Iterable[Any], base: int = 1) -> None:
        """Refuse in advance a call whose numbers and texts multiply to an absurd size."""
        for argument in arguments:
            if isinstance(argument, int | float) and not abs(argument) <= _LARGEST_NUMBER:
                raise jinja2.TemplateError(f"it asks for {argument!s:.20}, which is too many")
            if isinstance(argument, int) and argument > 1000:
                base *= argument
            elif isinstance(argument, str) and len(argument) > 1000:
                base *= len(argument)
        if base > _MOST_HANDLED:
            raise jinja2.TemplateError("it makes a text longer than any conversation")

    def _loop(self, values: Any, literal: int) -> Iterator[Any]:
        for value in values:
            self.steps += 1
            self.handled += literal
            self.pay(None)
            yield value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator, unless its result would be absurdly large."""
        if operator in ("*", "**"):
            self.ask([left, right], len(left) if isinstance(left, list) else 1)
        if operator == "%" and isinstance(left, str):
            self.ask_format(left, right if isinstance(right, tuple) else (right,))
        return self.pay(super().call_binop(context, operator, left, right))

    def ask_format(self, text: str, values: Iterable[Any]) -> None:
        """Refuse what a format would make too wide, before it is done."""
        self.ask(values)
        if _WIDE.search(text):
            raise jinja2.TemplateError("a format asks for a width that is too large")
        self.pay(list(values), whole=True)

    def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:
        """Call a method, macro or function."""
        # The sandbox wraps str.format in its own function.
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        values = [*arguments, *named.values()]
        if isinstance(owner, str) and function.__name__ in ("format", "format_map"):
            self.ask_format(owner, values)
        elif isinstance(owner, str):
            self.ask(values, max(len(owner), 1))
            self.pay(values, whole=True)
        if isinstance(function, Macro):
            self.handled += self.length
        self.pay(None)
        return self.pay(super().call(context, function, *arguments, **named))

    def bounded(self, source: str) -> nodes.Template:
        """Parse a template and put what pays for it into its tree."""
        tree = self.parse(source)
        found: list[Any] = list(
            tree.find_all((nodes.Concat, nodes.List, nodes.Tuple, nodes.For, nodes.Output))
        )
        for node in [*found, *tree.find_all(nodes.Assign)]:
            if isinstance(node, nodes.Concat):
                node.nodes = [self._filter(part, "_shown") for part in node.nodes]
            elif isinstance(node, nodes.List | nodes.Tuple):
                if getattr(node, "ctx", "load") == "load":  # otherwise it is an assignment target
                    node.items = [self._filter(part, "_made") for part in node.items]
            elif isinstance(node, nodes.For):
                node.iter = self._filter(node.iter, "_loop", len(source))
            elif isinstance(node, nodes.Output):
                node.nodes = [
                    part if isinstance(part, nodes.TemplateData) else self._filter(part, "_shown")
                    for part in node.nodes
                ]
            elif isinstance(node, nodes.Assign):
                node.node = self._filter(node.node, "_made")
        return tree

    def _filter(self, node: Any, name: str, *arguments: int) -> nodes.Filter:
        given = [nodes.Const(argument) for argument in arguments]
        made = nodes.Filter(node, name, given, [], None, None)
        return made.set_lineno(node.lineno).set_environment(self)  # type: ignore[return-value]


def _paid(
    environment: _BoundedEnvironment, filter_name: str, function: Callable[..., Any]
) -> Callable[..., Any]:
    """Wrap a filter or test; it still gets the environment or context if it asks for one."""
    passed = getattr(function, "jinja_pass_arg", None)

    def paid(*arguments: Any, **named: Any) -> Any:
        value, *others = arguments[1 if passed else 0 :]
        others += named.values()
        if filter_name == "format":
            environment.ask_format(str(value), others)
        elif filter_name in _MULTIPLYING:
            environment.ask(others, len(value) if isinstance(value, str | list | tuple) else 1)
        else:
            for other in others:
                environment.ask([other])
        if filter_name not in _PASSING:
            environment.pay(value, whole=True)
        result = function(*arguments, **named)
        return result if isinstance(result, Iterator) else environment.pay(result)

    if passed is not None:
        paid.jinja_pass_arg = passed  # type: ignore[attr-defined]
    return paid


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def template_date(format_: str) -> str:
    """Return the date that templates see, in a strftime format."""
    return _TEMPLATE_DATE.strftime(format_)


@lru_cache(maxsize=8)
def _compile(template: str) -> tuple[_BoundedEnvironment, jinja2.Template]:
    """Compile like transformers, but with a fixed date, which transformers cannot set."""
    environment = _BoundedEnvironment()
    environment.start(len(template))
    return environment, environment.from_string(environment.bounded(template))


def variables(template: str) -> frozenset[str]:
    """Return the names that a chat template reads from outside, jinja's own apart.

    A name that the template also sets counts only where it asks whether it is there, as in
    `{% if x is not defined %}{% set x = 1 %}` or `{% set x = x | default(1) %}`. A broken template
    reads none: rendering says what is wrong with it.
    """
    environment = _BoundedEnvironment()
    try:
        tree = environment.parse(template)
        found = jinja2.meta.find_undeclared_variables(tree)
    except (jinja2.TemplateError, RecursionError):
        return frozenset()
    own = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"}
    asked = {
        node.node.name
        for node in tree.find_all((nodes.Test, nodes.Filter))
        if node.name in _ASKING and isinstance(node.node, nodes.Name)
    }
    return frozenset(found - environment.globals.keys() - (own - asked))


def render(template: str, /, **values: Any) -> str:
    """Render a chat template.

    Args:
        template: Jinja source.
        **values: Variables for the template.

    Raises:
        ValueError: If it is broken, rejects these values, or needs more than any conversation does.
    """
    try:
        environment, compiled = _compile(template)
        environment.start(len(template))
        pieces = []
        for piece in compiled.generate(**values):
            environment.handled += len(piece)
            pieces.append(piece)
        return "".join(pieces)
    except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(f"{error!s:.300}") from error
    except RecursionError:
        raise ValueError("it never ends: it calls itself") from None
    except MemoryError:
        raise ValueError("it takes more memory than there is") from None
