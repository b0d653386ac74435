"Every public name says what it does, what it takes and what it gives, and a notebook shows it in use."
import ast, importlib, inspect, json, re, sys, pytest
from dataclasses import is_dataclass
from fastcore.docments import docments
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import docs

CORE = ROOT/'fastai_jocor'
MODULES = [*docs.modules(CORE), *(f'lab.{o}' for o in docs.modules(CORE/'lab'))]
MODULES.remove('all')
VARIABLE = inspect.Parameter.VAR_POSITIONAL,inspect.Parameter.VAR_KEYWORD

def tree(module): return ast.parse((CORE/f"{module.replace('.', '/')}.py").read_text(encoding='utf-8'))
def decorators(node): return ' '.join(map(ast.unparse, node.decorator_list))

def public(module):
    "Names of a module with what they stand for: those in `__all__`, and the methods that it gives to other classes"
    mod = importlib.import_module(f'fastai_jocor.{module}')
    for name in mod.__all__: yield name,getattr(mod, name)
    for node in tree(module).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith('_'): continue
        if 'patch' not in decorators(node): continue
        o = inspect.getattr_static(getattr(mod, ast.unparse(node.args.args[0].annotation)), node.name)
        yield node.name,getattr(o, 'fget', getattr(o, 'f', o))

def returns(node): return {o for o in ast.walk(node) if isinstance(o, (ast.Return,ast.Yield)) and o.value is not None}
def functions(node): return [o for o in ast.walk(node) if isinstance(o, (ast.FunctionDef,ast.Lambda)) and o is not node]

def gives(node):
    "Whether a function returns or yields a value; a command prints, and a context manager yields to a `with`"
    if re.search('call_parse|contextmanager', decorators(node)) or isinstance(node.returns, ast.Constant): return False
    return bool(returns(node) - {o for f in functions(node) for o in returns(f)})

def is_explained(o):
    "Whether a name has a docstring that is not a dataclass's own"
    doc = (o.__doc__ or '').strip()
    return bool(doc) and not (inspect.isclass(o) and is_dataclass(o) and doc.startswith(f'{o.__name__}('))

def undocumented(o, node):
    "What is missing at a function or a class"
    if not is_explained(o): yield 'docstring'
    f = vars(o).get('__init__') if inspect.isclass(o) and not is_dataclass(o) else o
    if f is None: return
    found = docments(f, full=True)
    for name,d in found.items():
        if name not in ('self','cls','return') and d.kind not in VARIABLE and not d.docment: yield f'argument {name}'
    says = 'return' in found and found['return'].docment
    if isinstance(node, ast.FunctionDef) and gives(node) and not says: yield 'return'

def problems(module):
    nodes = {o.name: o for o in tree(module).body if isinstance(o, (ast.FunctionDef,ast.ClassDef))}
    for name,o in public(module):
        if name in nodes: yield from (f'{module}.{name}: {what}' for what in undocumented(o, nodes[name]))

def used(source):
    "Names that a cell uses, other than to import them"
    nodes = list(ast.walk(ast.parse(re.sub(r'(?m)^\s*[%!].*', '', source))))
    return {o.id for o in nodes if isinstance(o, ast.Name)} | {o.attr for o in nodes if isinstance(o, ast.Attribute)}

def is_shown(cell):
    "Whether a cell is run and makes no module"
    source = ''.join(cell['source'])
    return cell['cell_type'] == 'code' and not re.search(r'(?m)^#\| *(export|slow|cuda|eval: *false)', source)

def examples(nbs=ROOT/'nbs'):
    "Names that occur in cells that are run and do not make the modules"
    hidden = lambda p: any(o.startswith(('.','_')) for o in p.relative_to(nbs).parts)
    files = [p for p in sorted(nbs.rglob('*.ipynb')) if not hidden(p)]
    cells = [c for p in files for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if is_shown(c)]
    return set().union(*(used(''.join(c['source'])) for c in cells))

@pytest.mark.parametrize('module', MODULES)
def test_public_names_are_explained(module): assert list(problems(module)) == []

def test_public_names_are_shown_in_use():
    shown = examples()
    assert [f'{m}.{name}' for m in MODULES for name,_ in public(m) if name not in shown] == []

MADE = '''def f(a, b=1):
    return a

class C:
    "A class"
    def __init__(self,
        a, # First
        b=1
    ): pass
'''

def test_what_is_missing_is_found(tmp_path):
    (tmp_path/'made.py').write_text(MADE)
    spec = importlib.util.spec_from_file_location('made', tmp_path/'made.py')
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    f,c = ast.parse(MADE).body
    assert list(undocumented(made.f, f)) == ['docstring','argument a','argument b','return']
    assert list(undocumented(made.C, c)) == ['argument b']

def test_examples_are_cells_that_are_run(tmp_path):
    sources = '#| export\nf(1)', '#| slow\ng(1)', 'from made import h', 'm.k(1)\n!ls'
    cells = [dict(cell_type='code', source=o) for o in sources]
    (tmp_path/'a.ipynb').write_text(json.dumps(dict(cells=cells)))
    assert examples(tmp_path) == {'m','k'}
