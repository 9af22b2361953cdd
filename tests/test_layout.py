"""The house rules, held by tests: the order of the runtime, the size of its parts, and what is said about them."""
import ast
import builtins
import importlib.util
import json
import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Set, Tuple, Type, Union

from harness import ROOT, RUNTIME

SOURCE = RUNTIME.read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"# == ([0-9]+\. .+) ==")
MAP_ENTRY = re.compile(r"    ([0-9]+\. .+)")

FUNCTION_LINES_LIMIT = 60
COMPLEXITY_LIMIT = 12
NESTING_LIMIT = 3
PARAMETERS_LIMIT = 5
BROAD_EXCEPTS_LIMIT = 3
FIRST_LINE_COLUMNS = 120
THIRD_PARTY = {  # imported only where a class needs them
    "cloudpickle", "fastapi", "flask", "requests", "starlette", "uvicorn", "uvloop", "werkzeug"}
HEAVY = {  # what a pod that needs none of it must not wait for
    "argparse", "asyncio", "base64", "cloudpickle", "concurrent.futures", "fastapi", "flask", "hashlib", "multiprocessing",
    "requests", "subprocess", "unittest", "urllib.request", "uvicorn",
}

FunctionDef = (ast.FunctionDef, ast.AsyncFunctionDef)
Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]
Scope = Union[Function, ast.Lambda, ast.ClassDef]
COMPREHENSIONS: Tuple[Type[ast.AST], ...] = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BRANCHES: Tuple[Type[ast.AST], ...] = (
    ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.BoolOp, *COMPREHENSIONS)
BLOCKS: Tuple[Type[ast.AST], ...] = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try)


def own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """Yield what is below a node, without the insides of functions and classes that it holds."""
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, (*FunctionDef, ast.ClassDef)):
            yield from own_nodes(child)


def named_functions(node: ast.AST = TREE, prefix: str = "") -> Iterator[Tuple[str, Function]]:
    """Yield every function, nested ones too, with its dotted name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FunctionDef, ast.ClassDef)):
            if isinstance(child, FunctionDef):
                yield prefix + child.name, child
            yield from named_functions(child, prefix + child.name + ".")
        else:
            yield from named_functions(child, prefix)


FUNCTIONS = dict(named_functions())


# == The map ==


def test_the_map_in_the_docstring_lists_the_sections_in_their_order() -> None:
    mapped = [match[1] for match in map(MAP_ENTRY.fullmatch, (ast.get_docstring(TREE) or "").splitlines()) if match]
    banners = [match[1] for match in map(BANNER.fullmatch, LINES) if match]
    assert mapped == banners
    assert [int(banner.partition(".")[0]) for banner in banners] == list(range(1, len(banners) + 1))


def test_every_section_begins_with_up_to_three_lines_that_say_what_it_is() -> None:
    for number, line in enumerate(LINES):
        if BANNER.fullmatch(line):
            said = [following.startswith("# ") for following in LINES[number + 1:number + 5]]
            assert said[0] and not said[3], "under %r" % line


# == Order ==


def bound_names(scope: Scope) -> Set[str]:
    """List what a scope binds: arguments, targets, imports and definitions."""
    names = {argument.arg for argument in all_arguments(scope)} if not isinstance(scope, ast.ClassDef) else set()
    declared: Set[str] = set()
    for node in own_nodes(scope):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, (*FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            declared.update(node.names)
    return names - declared


def uses(node: ast.AST, hidden: Set[str], exempt: bool = False) -> Iterator[ast.Name]:
    """Yield the module-level names that code reads; `hidden` ones are bound nearer by."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in hidden and not exempt:
        yield node
    if isinstance(node, (*FunctionDef, ast.Lambda)):
        hidden = hidden | bound_names(node)
    for child in ast.iter_child_nodes(node):
        is_start = isinstance(node, ast.ClassDef) and isinstance(child, FunctionDef) and child.name == "start"
        yield from uses(child, hidden, exempt or is_start)


def section_of(line: int) -> int:
    """Tell the number of the section that a line is in, 0 before the first."""
    before = [match for match in map(BANNER.fullmatch, LINES[:line]) if match]
    return int(before[-1][1].partition(".")[0]) if before else 0


def home_sections() -> Dict[str, int]:
    """Map each module-level name to the section that first defines it."""
    homes: Dict[str, int] = {}
    for statement in TREE.body:
        if isinstance(statement, (*FunctionDef, ast.ClassDef)):
            names = {statement.name}
        else:
            module = ast.ClassDef(name="", bases=[], keywords=[], body=[statement], decorator_list=[])
            names = bound_names(module)
        for name in names:
            homes.setdefault(name, section_of(statement.lineno))
    return homes


def test_no_section_uses_a_name_of_a_later_one() -> None:
    homes = home_sections()
    body = [node for node in TREE.body if not (isinstance(node, ast.FunctionDef) and node.name == "main")]
    late = ["line %d: %s" % (use.lineno, use.id) for statement in body for use in uses(statement, set())
            if homes.get(use.id, 0) > section_of(use.lineno)]
    assert not late


def test_every_name_that_is_used_is_defined() -> None:
    known = set(home_sections()) | set(dir(builtins)) | {"__file__", "__name__", "__doc__"}
    undefined = {use.id for statement in TREE.body for use in uses(statement, set())} - known
    class_names = {name for node in ast.walk(TREE) if isinstance(node, ast.ClassDef) for name in bound_names(node)}
    comprehended = {name.id for node in ast.walk(TREE) if isinstance(node, ast.comprehension)
                    for name in ast.walk(node.target) if isinstance(name, ast.Name)}
    assert not undefined - class_names - comprehended


# == Size ==


def over(limit: int, measure: Callable[[Function], int]) -> Dict[str, int]:
    """Measure every function, and list those that are over a limit."""
    measured = {name: measure(function) for name, function in FUNCTIONS.items()}
    return {name: value for name, value in measured.items() if value > limit}


def test_functions_are_short() -> None:
    assert over(FUNCTION_LINES_LIMIT, lambda each: (each.end_lineno or 0) - each.lineno + 1) == {}


def test_functions_branch_little() -> None:
    assert over(COMPLEXITY_LIMIT, lambda each: 1 + sum(isinstance(node, BRANCHES) for node in own_nodes(each))) == {}


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Count how deep blocks lie in each other; an `elif` lies beside its `if`."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FunctionDef, ast.ClassDef)):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and [child] == node.orelse and (
            LINES[child.lineno - 1].lstrip().startswith("elif"))
        deepest = max(deepest, nesting(child, depth + (isinstance(child, BLOCKS) and not is_elif)))
    return deepest


def test_functions_nest_little() -> None:
    assert over(NESTING_LIMIT, nesting) == {}


def all_arguments(function: Union[Function, ast.Lambda]) -> List[ast.arg]:
    """List the arguments of a function, starred ones too."""
    arguments = function.args
    starred = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *starred]


def given_arguments(function: Function) -> List[ast.arg]:
    """List the arguments that a caller gives: all but self and cls."""
    return [argument for argument in all_arguments(function) if argument.arg not in ("self", "cls")]


def test_functions_take_few_parameters() -> None:
    assert over(PARAMETERS_LIMIT, lambda each: len(given_arguments(each))) == {}


# == What is said ==


def test_every_argument_and_every_result_is_annotated() -> None:
    assert [name for name, function in FUNCTIONS.items()
            if function.returns is None or any(argument.annotation is None for argument in given_arguments(function))] == []


def public_definitions(node: ast.AST = TREE, prefix: str = "") -> Iterator[Tuple[str, Union[Function, ast.ClassDef]]]:
    """Yield public functions and classes, and the public methods of the latter."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public_definitions(child, prefix + child.name + ".")


def test_every_public_name_is_documented() -> None:
    assert [name for name, node in public_definitions() if not ast.get_docstring(node)] == []


def test_a_docstring_begins_with_a_sentence_on_one_line() -> None:
    for node in ast.walk(TREE):
        docstring = ast.get_docstring(node) if isinstance(node, (ast.Module, ast.ClassDef, *FunctionDef)) else None
        if docstring:
            first = docstring.splitlines()[0]
            assert re.fullmatch(r"""["`'A-Z].*\.""", first), first
    firsts = [line for line in LINES if line.lstrip().startswith('"""')]
    assert [line for line in firsts if len(line) > FIRST_LINE_COLUMNS] == []


# == What is not done ==


def is_broad(handler: ast.ExceptHandler) -> bool:
    """Tell whether a handler catches what nobody thought of."""
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException")) for kind in kinds)


def test_broad_excepts_are_few() -> None:
    broad = [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.ExceptHandler) and is_broad(node)]
    assert len(broad) <= BROAD_EXCEPTS_LIMIT, "lines %s" % broad


def test_the_environment_is_read_only_where_it_is_a_default_argument() -> None:
    defaults = {id(default) for function in FUNCTIONS.values() for default in function.args.defaults + function.args.kw_defaults}
    reads = [node for node in ast.walk(TREE) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
             and node.value.id == "os" and node.attr in ("environ", "environb", "getenv", "getenvb", "putenv")]
    assert [node.lineno for node in reads if id(node) not in defaults] == []


def imported_modules() -> Set[str]:
    """List the top-level packages that are imported anywhere in the file."""
    names: Set[str] = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def is_of_the_standard_library(name: str) -> bool:
    """Tell whether Python itself brings a module."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return False
    if spec.origin in ("built-in", "frozen"):
        return True
    library = Path(sysconfig.get_paths()["stdlib"])
    return library in Path(spec.origin).parents and "site-packages" not in spec.origin


def test_nothing_is_imported_but_the_standard_library_and_what_a_class_may_need() -> None:
    assert {name for name in imported_modules() if not is_of_the_standard_library(name)} <= THIRD_PARTY


def modules_after(python: str, statement: str) -> Set[str]:
    """List the modules that a fresh interpreter has after a statement."""
    code = "import sys; sys.path.insert(0, %r); %s; import json; print(json.dumps(list(sys.modules)))" % (str(ROOT), statement)
    return set(json.loads(subprocess.check_output([python, "-I", "-B", "-c", code], timeout=30)))


def test_importing_the_runtime_imports_nothing_that_a_class_may_never_need(slim_python: str) -> None:
    unavoidable = modules_after(slim_python, "import http.server, http.client, importlib.metadata, logging, socketserver")
    assert modules_after(slim_python, "import ais_runtime_min") & HEAVY <= unavoidable
