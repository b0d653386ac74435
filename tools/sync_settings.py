"""Write pyproject.toml and `__version__` from settings.ini, and the version and addresses elsewhere.

    python tools/sync_settings.py            # write
    python tools/sync_settings.py --check    # fail if something differs
"""
import configparser, json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBDEV_TEXT = 'nbs_path doc_path branch title copyright'.split()
NBDEV_BOOL = 'recursive clean_ids custom_sidebar'.split()

def read_settings(root=ROOT):
    "Return the `[DEFAULT]` section of settings.ini as a mapping of strings."
    cfg = configparser.ConfigParser(interpolation=None)
    with open(root/'settings.ini', encoding='utf-8') as f: cfg.read_file(f)
    return cfg['DEFAULT']

def toml_list(items, indent=4):
    "Format strings as a TOML array, one item a line."
    return '[\n' + ''.join(f'{" "*indent}{json.dumps(o)},\n' for o in items) + ']'

def classifiers(s):
    "What the index of packages sorts by"
    python = 'Programming Language :: Python :: 3'
    return [s['status'], f"Intended Audience :: {s['audience']}",
            *(f"Operating System :: {o.replace('::', ' :: ')}" for o in s['systems'].split()),
            python, f'{python} :: Only', *(f'Programming Language :: Python :: {o}' for o in s['pythons'].split()),
            'Topic :: Scientific/Engineering :: Artificial Intelligence', 'Typing :: Typed']

def pyproject(s):
    "The text of pyproject.toml for the settings `s`."
    scripts = [o.strip().split('=') for o in s['console_scripts'].splitlines() if o.strip()]
    extras = {k[:-len('_requirements')]: s[k].split() for k in s if k.endswith('_requirements')}
    nbdev = {**{k: s[k] for k in NBDEV_TEXT}, **{k: s.getboolean(k) for k in NBDEV_BOOL},
             'tst_flags': s['tst_flags'].split(), 'strip_libs': s['strip_libs'].split(),
             'doc_procs': s['doc_procs'].split()}
    return f'''# Written by tools/sync_settings.py from settings.ini: edit that file instead.
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{s['lib_name']}"
dynamic = ["version"]
description = {json.dumps(s['description'])}
readme = "README.md"
requires-python = ">={s['min_python']}"
license = "{s['license']}"
license-files = ["LICENSE"]
authors = [{{name = {json.dumps(s['author'])}, email = {json.dumps(s['author_email'])}}}]
keywords = {toml_list(s['keywords'].split())}
classifiers = {toml_list(classifiers(s))}
dependencies = {toml_list(s['requirements'].split())}

[project.optional-dependencies]
''' + ''.join(f'{k} = {toml_list(v)}\n' for k,v in extras.items()) + f'''
[project.urls]
Repository = "{s['git_url']}"
{documentation(s)}
[project.scripts]
''' + ''.join(f'{k.strip()} = "{v.strip()}"\n' for k,v in scripts) + f'''
[project.entry-points.nbdev]
{s['lib_path']} = "{s['lib_path']}._modidx:d"

[tool.setuptools.dynamic]
version = {{attr = "{s['lib_path']}.__version__"}}

[tool.setuptools.packages.find]
include = ["{s['lib_path']}*"]

[tool.setuptools.package-data]
"{s['lib_path']}" = ["py.typed"]
"{s['lib_path']}.lab" = ["templates/*", "grids/*"]

[tool.nbdev]
''' + ''.join(f'{k} = {json.dumps(v)}\n' for k,v in nbdev.items()) + '''
[tool.pytest.ini_options]
testpaths = ["tests"]
addopts = "-p no:randomly"
'''

def documentation(s):
    "The address that nbdev writes into each module, once something is there; it needs that of the repository always"
    return f'Documentation = "{s["doc_url"]}"\n' if s.getboolean('published') else ''

def with_version(code, version):
    "The text `code` of an `__init__.py` with `__version__` set to `version`."
    line = f'__version__ = "{version}"'
    return re.sub(r'^__version__ = .*$', line, code, flags=re.M) if '__version__' in code else f'{line}\n{code}'

def citation(text, s):
    "CITATION.cff with the version, and with the addresses once something is there"
    text = re.sub(r'(?m)^(repository-code|url): .*\n', '', text)
    there = f"repository-code: {json.dumps(s['git_url'])}\nurl: {json.dumps(s['doc_url'])}\n"
    return re.sub(r'(?m)^version: .*\n', f"version: {s['version']}\n" + there*s.getboolean('published'), text)

def with_addresses(text, s):
    "A page or a notebook with the addresses of the settings; what a Kaggle notebook installs from is empty before"
    name = s['lib_name']
    text = re.sub(rf'https://github\.com/[\w-]+/{name}\b', s['git_url'], text)
    text = re.sub(rf'https://[\w-]+\.github\.io/{name}/', s['doc_url'], text)
    source = f"git+{s['git_url']}" if s.getboolean('published') else ''
    return re.sub(r"(?m)(\bADDRESS = )'[^']*'", rf"\1'{source}'", text)

def pages(root=ROOT):
    "Files that may name an address"
    hidden = lambda p: any(o.startswith(('.','_')) for o in p.relative_to(root).parts[:-1])
    found = [p for d in ('nbs','kaggle') for p in (root/d).rglob('*.ipynb') if not hidden(p)]
    return [*found, *(p for o in ('*.md','_quarto.yml') for p in root.glob(o) if p.name != 'README.md')]

def targets(root=ROOT):
    "Map each written file to the text that it should have."
    s, init, cff = read_settings(root), root/'fastai_jocor'/'__init__.py', root/'CITATION.cff'
    code = init.read_text(encoding='utf-8') if init.exists() else ''
    found = {p: with_addresses(p.read_text(encoding='utf-8'), s) for p in pages(root)}
    if cff.exists(): found[cff] = citation(cff.read_text(encoding='utf-8'), s)
    return found | {root/'pyproject.toml': pyproject(s), init: with_version(code, s['version'])}

def main(check=False, root=ROOT):
    "Write the files, or with `check` only say which of them differ; return an exit code."
    drift = {p: t for p,t in targets(root).items() if not p.exists() or p.read_text(encoding='utf-8') != t}
    for p,t in drift.items():
        print(f"{p.relative_to(root).as_posix()}: {'differs from settings.ini' if check else 'written'}")
        if not check: p.write_text(t, encoding='utf-8', newline='\n')
    if check and drift: print('Run: python tools/sync_settings.py')
    return int(check and bool(drift))

if __name__ == '__main__': sys.exit(main('--check' in sys.argv[1:]))
