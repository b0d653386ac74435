"""Code that can be read: short lines, short cells, small rooms, imports that go downwards only.

What is not yet so is listed in data/style_exceptions.txt, with how far off it may be. The list may only shrink."""
import ast, json, re, subprocess, sys, pytest
import numpy as np
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import docs

CORE = ROOT/'fastai_jocor'
LAB = CORE/'lab'
EXCEPTIONS = ROOT/'tests'/'data'/'style_exceptions.txt'

LINE,MODULE,CELL,CLASS,P95 = 120,250,60,130,105

def name_of(p): return p.relative_to(ROOT).as_posix()
def lines(p): return p.read_text(encoding='utf-8').splitlines()

def modules(): return sorted(p for p in CORE.rglob('*.py') if p.name != '_modidx.py')
def core(): return [p for p in modules() if p.parent == CORE]

def scripts():
    "Python files besides the library"
    found = [ROOT/'dev.py', *(p for d in ('tests','benchmarks','tools') for p in (ROOT/d).rglob('*.py'))]
    return sorted(p for p in found if 'frozen' not in p.parts)

def notebooks():
    found = [p for d in ('nbs','kaggle') for p in (ROOT/d).rglob('*.ipynb')]
    return sorted(p for p in found if not any(o.startswith(('.','_')) for o in p.relative_to(ROOT).parts))

def code_cells(p):
    cells = json.loads(p.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == 'code']

def is_exported(source): return bool(re.search(r'(?m)^#\| *export', source))

# --- the measures: from a file to how far it is off, 0 where it is as it should be

def too_long(text_lines):
    "How many lines of code are too long; a directive such as `fig-alt` and what nbdev writes are not"
    return sum(len(o) > LINE and not o.startswith(('#| ','__all__ = ')) for o in text_lines)

def long_lines():
    found = {name_of(p): too_long(lines(p)) for p in modules()+scripts()}
    return found | {name_of(p): sum(too_long(c.splitlines()) for c in code_cells(p)) for p in notebooks()}

def long_modules(): return {name_of(p): max(len(lines(p))-MODULE, 0) for p in modules()}

def long_cells():
    is_long = lambda c: is_exported(c) and len(c.splitlines()) > CELL
    return {name_of(p): sum(map(is_long, code_cells(p))) for p in notebooks()}

def long_classes():
    nodes = [(p, o) for p in modules() for o in ast.walk(ast.parse(p.read_text(encoding='utf-8')))]
    sizes = {f'{name_of(p)}:{o.name}': o.end_lineno-o.lineno+1 for p,o in nodes if isinstance(o, ast.ClassDef)}
    return {name: max(n-CLASS, 0) for name,n in sizes.items()}

def p95_of_the_core():
    sizes = [len(o) for p in core() for o in lines(p) if o.strip()]
    return dict(core=max(int(np.percentile(sizes, 95))-P95, 0))

def imported(p):
    "Modules of the project that a module imports, such as `losses` or `lab.run`"
    here = ['lab'] if p.parent == LAB else []
    for node in ast.walk(ast.parse(p.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (o.name.partition('.')[2] for o in node.names if o.name.startswith('fastai_jocor.'))
        if not isinstance(node, ast.ImportFrom): continue
        module = node.module.split('.') if node.module else []
        if node.level: base = here[:len(here)-node.level+1] + module
        elif module and module[0] == 'fastai_jocor': base = module[1:]
        else: continue
        known = lambda o: (CORE.joinpath(*base, o).with_suffix('.py')).exists()
        if base and base != ['lab']: yield '.'.join(base)
        else: yield from ('.'.join([*base, o.name]) for o in node.names if known(o.name))

def rank(module, order):
    "Where a module stands: `all` above the lab, the lab above the core"
    if module == 'all': return 2,0
    return (1,order.index(module)) if module.startswith('lab.') else (0,order.index(module))

def order_of_modules(): return [*docs.modules(CORE), *(f'lab.{o}' for o in docs.modules(LAB))]

def upward_imports():
    "Imports of a module that does not stand below, as `importing:imported`"
    order = order_of_modules()
    named = [(p, '.'.join(p.relative_to(CORE).with_suffix('').parts)) for p in modules() if p.stem != '__init__']
    pairs = {(own, used) for p,own in named for used in imported(p)}
    return {f'{own}:{used}': int(rank(used, order) >= rank(own, order)) for own,used in pairs}

RULES = {'line': long_lines, 'module': long_modules, 'cell': long_cells, 'class': long_classes,
    'p95': p95_of_the_core, 'import': upward_imports}

def exceptions():
    "From the rule and the name to how far off it may be"
    rows = [o.split() for o in lines(EXCEPTIONS) if o.strip() and not o.startswith('#')]
    return {(rule, name): int(n) for rule,name,n in rows}

@pytest.mark.parametrize('rule', RULES)
def test_style(rule):
    allowed = exceptions()
    found = {name: n for name,n in RULES[rule]().items() if n > allowed.get((rule, name), 0)}
    assert not found, f'{rule}: {found}'

def test_exceptions_are_needed():
    "An exception goes when it is no longer needed"
    measured = {(rule, name): n for rule,f in RULES.items() for name,n in f().items()}
    assert not [o for o in exceptions() if not measured.get(o)], 'shrink the list: python tests/test_style.py'

def shrink():
    "Bring the list of exceptions down to what is measured"
    measured = {(rule, name): n for rule,f in RULES.items() for name,n in f().items()}
    left = {o: min(n, measured.get(o, 0)) for o,n in exceptions().items()}
    head = '# rule, name, how far off it may be; the list may only shrink (python tests/test_style.py)\n'
    rows = [f'{rule} {name} {n}\n' for (rule,name),n in left.items() if n]
    EXCEPTIONS.write_text(head + ''.join(rows), encoding='utf-8')

def test_the_measures_see(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], 'ROOT', tmp_path)
    monkeypatch.setattr(sys.modules[__name__], 'CORE', tmp_path/'fastai_jocor')
    for d in ('fastai_jocor/lab','tests','tools','benchmarks','nbs','kaggle'): (tmp_path/d).mkdir(parents=True)
    (tmp_path/'dev.py').write_text('x'*121)
    (tmp_path/'fastai_jocor'/'a.py').write_text('class A:\n' + '    x = 1\n'*300)
    sources = ['#| export\n' + 'x = 1\n'*60, '#| fig-alt: ' + 'x'*200]
    cells = [dict(cell_type='code', source=[o]) for o in sources]
    (tmp_path/'nbs'/'b.ipynb').write_text(json.dumps(dict(cells=cells)))
    (tmp_path/'fastai_jocor'/'lab'/'c.py').write_text('y'*130)
    assert long_lines() == {'dev.py': 1, 'fastai_jocor/a.py': 0, 'fastai_jocor/lab/c.py': 1, 'nbs/b.ipynb': 0}
    assert long_modules() == {'fastai_jocor/a.py': 51, 'fastai_jocor/lab/c.py': 0}
    assert long_cells() == {'nbs/b.ipynb': 1} and long_classes() == {'fastai_jocor/a.py:A': 171}
    assert p95_of_the_core() == dict(core=0)

# --- core and lab

def test_every_module_comes_from_a_notebook():
    order = order_of_modules()
    assert len(order) == len(set(order)) and set(order) >= {'losses','callback','all'}
    assert {p.stem for p in modules()} - {'__init__'} == {o.split('.')[-1] for o in order}

def test_imports_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], 'CORE', tmp_path)
    monkeypatch.setattr(sys.modules[__name__], 'LAB', tmp_path/'lab')
    (tmp_path/'lab').mkdir()
    for name in ('losses','peers'): (tmp_path/f'{name}.py').write_text('')
    rows = 'import torch, fastai_jocor.losses','from .peers import Peers','from . import losses'
    (tmp_path/'here.py').write_text('\n'.join([*rows, 'from fastai_jocor.lab.run import run']))
    assert list(imported(tmp_path/'here.py')) == ['losses','peers','losses','lab.run']
    (tmp_path/'lab'/'there.py').write_text('from .run import run\nfrom ..peers import Peers\nfrom .. import losses\n')
    assert list(imported(tmp_path/'lab'/'there.py')) == ['lab.run','peers','losses']
    order = ['losses','peers','lab.run']
    assert rank('losses', order) < rank('peers', order) < rank('lab.run', order) < rank('all', order)

def test_training_does_not_load_the_lab():
    code = "import sys, fastai_jocor.callback; assert not [m for m in sys.modules if m.startswith('fastai_jocor.lab')]"
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)

if __name__ == '__main__': shrink()
