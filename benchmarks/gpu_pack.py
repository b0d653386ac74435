"""`python benchmarks/gpu.py pack --path DATA`: what has to travel to a GPU machine without a network, in .gpu.

DATA holds cifar10.tgz (the images in folders), CIFAR-10_human.pt, and MNIST/raw in torchvision's layout; what is
missing is left out, and said. `--data` names others, such as clothing_small.tgz and tf_efficientnet_lite0.pth.
The wheels are those of WHEELS, for Python 3.12 on 64-bit Linux. That nothing else is missing is checked by their
metadata, and by importing the library in a process that refuses any other package.
"""
import os, re, shutil, subprocess, sys, tarfile, tempfile, zipfile
from email.parser import Parser
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent/'tools'))
from sync_settings import read_settings

WHEELS = tuple(read_settings()['wheels'].split())
UNUSED = 'spacy', # fastai imports it only where words are to be told apart
BOX,MOST = HERE.parent/'.gpu',64*2**20

def norm(name): return re.sub(r'[-_.]+', '-', name).lower()

def there():
    "Names of the packages that the machine has"
    rows = (HERE/'gpu_packages.txt').read_text(encoding='utf-8').splitlines()
    return {norm(o) for row in rows if not row.startswith('#') for o in row.split()}

def needs(wheel):
    "Name of a wheel's package, and of what it needs on Linux with Python 3.12"
    from packaging.requirements import Requirement
    with zipfile.ZipFile(wheel) as z:
        name = next(o for o in z.namelist() if o.endswith('.dist-info/METADATA'))
        meta = Parser().parsestr(z.read(name).decode())
    env = dict(extra='', python_version='3.12', python_full_version='3.12.3', platform_system='Linux',
               sys_platform='linux', platform_machine='x86_64')
    wanted = [Requirement(o) for o in meta.get_all('Requires-Dist', [])]
    return norm(meta['Name']),{norm(o.name) for o in wanted if o.marker is None or o.marker.evaluate(env)}

def missing(wheels):
    "What the wheels need that is neither among them nor on the machine"
    have = dict(map(needs, wheels))
    return sorted(set().union(*have.values())-set(have)-there()-set(UNUSED))

REFUSING = '''
import importlib.metadata, importlib.util, sys
allowed = set(sys.argv[1].split(','))
owners = importlib.metadata.packages_distributions()
class Refuse:
    def find_spec(self, name, path=None, target=None):
        own = [o.lower().replace('_','-').replace('.','-') for o in owners.get(name.partition('.')[0], [])]
        if own and not allowed & set(own): raise ModuleNotFoundError(f'{name} is not there', name=name)
sys.meta_path.insert(0, Refuse())
import fastai.vision.all, fastai.text.all, fastai.tabular.all, fastai.distributed, pytest, hypothesis
import fastai_jocor.all, fastai_jocor.lab.report, fastai_jocor.lab.grid
import gpu_check, gpu_everyday, gpu_protocol, gpu_step, everyday
'''

def imports(wheels):
    "Import the library with these wheels and what the machine has only; gives what went wrong, or an empty text"
    allowed = {*there(), *(needs(o)[0] for o in wheels), 'fastai-jocor', 'pip', 'setuptools'}
    with tempfile.TemporaryDirectory() as site:
        for o in wheels:
            if o.name.endswith('-none-any.whl'): zipfile.ZipFile(o).extractall(site)
        env = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, (site, HERE.parent, HERE))))
        command = [sys.executable, '-W', 'ignore', '-c', REFUSING, ','.join(sorted(allowed))]
        return subprocess.run(command, capture_output=True, text=True, env=env).stderr[-800:]

def download(box):
    options = ['--no-deps','--only-binary=:all:','--python-version','3.12','--implementation','cp',
               '--platform','manylinux_2_28_x86_64','--platform','manylinux2014_x86_64']
    subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', *options, '-d', str(box), *WHEELS], check=True)

def take_data(path, names, box):
    "Copy the data; gives the names of what is not there"
    for name in names:
        if (path/name).is_file(): shutil.copyfile(path/name, box/name)
        if (path/name).is_dir() and name == 'MNIST/raw':
            with tarfile.open(box/'mnist.tgz', 'w:gz') as tar:
                for o in sorted((path/name).glob('*-ubyte')): tar.add(o, f'{name}/{o.name}')
    return [name for name in names if not (path/name).exists()]

def plan(path, names):
    "What would be packed"
    data = [path/name for name in names]
    return [*(f'wheel {o}' for o in WHEELS), *(f"data {o}{'' if o.exists() else ' (missing)'}" for o in data)]

def pack(path, names, dry=False, box=BOX):
    "Make the folder that travels, and say how large it is"
    if dry: return print('\n'.join(plan(path, names)))
    if path == box: sys.exit(f'--path={str(path)!r} must be the folder of the data, not the one that travels')
    shutil.rmtree(box, ignore_errors=True)
    box.mkdir()
    download(box)
    left_out = take_data(path, names, box)
    wheels = sorted(box.glob('*.whl'))
    for what in missing(wheels): print(f'missing: {what}')
    error = imports(wheels)
    if error: print(f'the library cannot be imported there:\n{error}')
    for o in sorted(box.iterdir()): print(f'{o.stat().st_size/2**20:7.2f} MiB  {o.name}')
    size = sum(o.stat().st_size for o in box.iterdir())
    print(f'{size/2**20:7.2f} MiB in {box}' + (f"; not found: {', '.join(left_out)}" if left_out else ''))
    if size > MOST: sys.exit(f'more than {MOST/2**20:g} MiB')
    if error or missing(wheels): sys.exit(1)
