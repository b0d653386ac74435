"""Rehearse a release, up to the upload: python tools/release.py [FOLDER]

Builds both distributions into dist/release, checks them, installs the wheel into an environment of its own, which
finds the other packages where this one has them, and runs two of its commands there."""
import os, re, shutil, subprocess, sys, sysconfig, tempfile, venv
from pathlib import Path
from sync_settings import ROOT, main as sync, read_settings

def run(*args, **kwargs):
    print('$', *(Path(a).name if os.sep in str(a) else a for a in args), flush=True)
    subprocess.run([str(a) for a in args], check=True, **kwargs)

def source(folder):
    "A copy of what git holds or would take, so that nothing else gets in"
    names = subprocess.run(['git','ls-files','-co','--exclude-standard'], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.splitlines()
    for o in names:
        if not (ROOT/o).is_file(): continue
        (folder/o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT/o, folder/o)

def ready(s):
    "What speaks against an upload"
    changes = (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')
    if sync(check=True): yield 'files differ from settings.ini'
    if not s.getboolean('published'): yield 'settings.ini says published = no'
    if not re.search(rf"(?m)^## {re.escape(s['version'])} \(\d{{4}}-\d\d-\d\d\)$", changes):
        yield f"CHANGELOG.md has no dated section {s['version']}"
    if subprocess.run(['git','status','--porcelain'], cwd=ROOT, capture_output=True).stdout:
        yield 'there are changes that are not committed'

def try_out(wheel, folder):
    "Install a wheel into an environment of its own, and use it there"
    venv.create(folder/'env', with_pip=True)
    site = next((folder/'env').rglob('site-packages'))
    (site/'others.pth').write_text(sysconfig.get_path('purelib'))
    commands = folder/'env'/('Scripts' if os.name == 'nt' else 'bin')
    env = {k: v for k,v in os.environ.items() if k != 'PYTHONPATH'} | dict(PYTHONWARNINGS='ignore', MPLBACKEND='agg')
    here = dict(cwd=folder, env=env)
    run(commands/'python', '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--ignore-installed', wheel, **here)
    where = subprocess.run([commands/'python', '-c', 'import fastai_jocor; print(fastai_jocor.__file__)'], **here,
                           capture_output=True, text=True, check=True).stdout.strip()
    if site.resolve() not in Path(where).resolve().parents: sys.exit(f'{where} was imported, not the wheel')
    run(commands/'jocor_bench', '--list', **here)
    run(commands/'jocor_demo', '--epochs', 2, '--seeds', 1, '--n-jobs', 1, **here)

def main(out=ROOT/'dist'/'release'):
    out = Path(out)
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as tmp:
        source(Path(tmp)/'source')
        run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', out.resolve(),
            cwd=Path(tmp)/'source', stdout=subprocess.DEVNULL)
        run(sys.executable, '-m', 'twine', 'check', '--strict', *out.iterdir())
        try_out(next(out.resolve().glob('*.whl')), Path(tmp))
    s = read_settings()
    print(f"\nboth distributions are good: {', '.join(p.name for p in sorted(out.iterdir()))}")
    for o in ready(s): print(f'not to be uploaded yet: {o}')
    print(f"the last step: git tag v{s['version']} && git push origin v{s['version']}")

if __name__ == '__main__': main(*sys.argv[1:])
