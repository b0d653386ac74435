"""What is to be measured on a GPU, for a machine that is at hand for some minutes: one call, which ends by itself.

    python benchmarks/gpu.py pack --path DATA    # where there is a network: wheels and data into .gpu, below 64 MiB
    python benchmarks/gpu.py pack --path DATA --data clothing_small.tgz,tf_efficientnet_lite0.pth     # other data
    python benchmarks/gpu.py check step loader --path .gpu --limit 300
    python benchmarks/gpu.py protocol --path .gpu --limit 570     # goes on where the last call stopped
    python benchmarks/gpu.py --device cpu --tiny --out /tmp/gpu   # a dry run of everything

A machine without a network needs torch, torchvision and the usual scientific packages (`gpu_packages.txt` names
what is taken to be there); what else is imported travels in .gpu, with the checkout, and is installed by

    python3 -m pip install -q --no-index --no-deps --target /tmp/site .gpu/*.whl && export PYTHONPATH=/tmp/site:$PWD

Parts, most valuable first; without a name all of them run, and each has its share of the time:

    check     the tests on the GPU; whether a step waits for the GPU; whether it computes what a CPU does
    step      milliseconds of a training step, in several ways, and what the hardware allows at best
    protocol  CIFAR-10 by the papers' protocol, 200 epochs, in bfloat16, as many runs side by side as --procs says
    mnist     MNIST likewise, all methods, five seeds
    loader    images a second from the loader in memory
    everyday  the slow part of everyday.py: photographs, and CIFAR-10 from scratch

Each part is a process of its own. What it finds is printed, and is appended at once, with the machine's name, to
lines.jsonl in the folder --out; runs are kept there as `jocor_bench` keeps them, for `jocor_report FOLDER/protocol`.
Whatever goes wrong is a line too, and the next part begins. With --home FOLDER all that is to be brought home is
packed there, in files of at most 15 MiB: `cat FOLDER/gpu.tar.* | tar x -C benchmarks/results/gpu`.
"""
import argparse, importlib, io, json, os, platform, signal, subprocess, sys, tarfile, time, traceback
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = dict(check='gpu_check', step='gpu_step', everyday='gpu_everyday', protocol='gpu_protocol',
             mnist='gpu_protocol', loader='gpu_step')
SHARES = dict(check=5, step=5, everyday=8, protocol=8, mnist=3, loader=1)

def parser():
    p = argparse.ArgumentParser(description='Measure on a GPU, within a time limit')
    p.add_argument('parts', nargs='*', help=f"{', '.join(PARTS)}, or pack; none for all but pack")
    p.add_argument('--device', choices=('cuda','cpu'), default='cuda', help='where to train')
    p.add_argument('--tiny', action='store_true', help='as little as shows that it works')
    p.add_argument('--limit', type=float, default=540, help='seconds in all, at least 1')
    p.add_argument('--out', type=Path, default=HERE/'results'/'gpu', help='where results are kept')
    p.add_argument('--path', type=Path, default=HERE.parent/'.gpu', help='folder of the data')
    p.add_argument('--procs', type=int, default=4, help='runs side by side; 0 trains in the process itself')
    p.add_argument('--home', type=Path, help='pack what is to be brought home into this folder')
    p.add_argument('--dry', action='store_true', help='pack: only say what would be packed')
    p.add_argument('--data', default='cifar10.tgz,CIFAR-10_human.pt,MNIST/raw', help='pack: which data')
    p.add_argument('--one', help=argparse.SUPPRESS)
    p.add_argument('--until', type=float, help=argparse.SUPPRESS)
    return p

# --- what is found

def facts(device):
    "The machine: `torch` is asked only where it has been imported already"
    torch = sys.modules.get('torch')
    res = dict(device=device, python=platform.python_version())
    if torch is None: return res
    res |= dict(torch=str(torch.__version__), cuda=torch.version.cuda)
    return res | (dict(gpu=torch.cuda.get_device_name()) if device == 'cuda' and torch.cuda.is_available() else {})

def note(args, part, what, machine=None, **figures):
    "Print a finding, and append it to the file of all findings"
    print(f'{part:9}{what:34}', '  '.join(f'{k} {v}' for k,v in figures.items() if k != 'trace'), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    line = dict(part=part, what=what, **figures, tiny=args.tiny, time=round(time.time()),
                machine=machine or facts(args.device))
    with (args.out/'lines.jsonl').open('a', encoding='utf-8') as f: f.write(json.dumps(line, default=str) + '\n')

def attempt(note, what, f, *args):
    "Note what a function finds, or what went wrong"
    try: note(what, **f(*args))
    except Exception as e: note(what, error=f'{type(e).__name__}: {e}'[:300], trace=traceback.format_exc()[-1500:])

def lines(out):
    "All findings"
    file = out/'lines.jsonl'
    return [json.loads(o) for o in file.read_text(encoding='utf-8').splitlines()] if file.exists() else []

# --- the parts, one after the other

def run_here(args):
    "Run a part in this process"
    say = partial(note, args, args.one)
    try:
        module = importlib.import_module(PARTS.get(args.one) or args.one)
        if args.device == 'cuda': _need_gpu()
        getattr(module, args.one)(args, say)
    except Exception as e:
        say('failed', error=f'{type(e).__name__}: {e}'[:300], trace=traceback.format_exc()[-1500:])
        sys.exit(1)

def _need_gpu():
    import torch
    if not torch.cuda.is_available(): raise RuntimeError("device='cuda': torch finds no GPU; pass --device cpu")

def run_part(args, part, until, spare):
    "Run a part in a process of its own, which is ended if it does not end by itself"
    flags = [f'--{o}={getattr(args, o)}' for o in ('device','out','path','procs')] + ['--tiny']*args.tiny
    command = [sys.executable, '-W', 'ignore', str(HERE/'gpu.py'), f'--one={part}', f'--until={until}', *flags]
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(HERE.parent), os.environ.get('PYTHONPATH', '')]))
    p = subprocess.Popen(command, env=env, start_new_session=True)
    try: code = p.wait(max(until+spare-time.time(), .1))
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL)
        p.wait()
        code = 'stopped at its time limit'
    if code in (0,1): return # 1: it has said itself what went wrong
    machine = next((o['machine'] for o in lines(args.out)[::-1] if o['part'] == part), facts(args.device))
    note(args, part, 'failed', machine, error=f'ended by {code}' if isinstance(code, int) else code)

def run_parts(args, parts):
    "Run the parts within the limit: each may take its share of the time that is left"
    spare = min(10., args.limit/8)
    end = time.time()+args.limit-2*spare
    for i,part in enumerate(parts):
        left = end-time.time()
        share = SHARES.get(part, 1)/sum(SHARES.get(o, 1) for o in parts[i:])
        if left <= 0: note(args, part, 'left out', error='no time was left')
        else: run_part(args, part, time.time()+left*share, spare)
        if args.home: pack_home(args.out, args.home)

# --- bringing it home

def to_bring(out, most):
    "Files that are to be brought home: all but checkpoints, and of these the newest, as many as there is room for"
    files = sorted(o for o in out.rglob('*') if o.is_file() and o.name not in ('lock','progress'))
    checkpoints = sorted((o for o in files if o.suffix == '.pth'), key=lambda o: -o.stat().st_mtime)
    files = [o for o in files if o.suffix != '.pth']
    left = most-sum(o.stat().st_size for o in files)
    for o in checkpoints:
        left -= o.stat().st_size
        if left >= 0: files.append(o)
    return files

def pack_home(out, home, most=45*2**20, piece=15*2**20):
    "Pack results into pieces of a tar file"
    box = io.BytesIO()
    with tarfile.open(fileobj=box, mode='w') as tar:
        for o in to_bring(out, most): tar.add(o, o.relative_to(out))
    home.mkdir(parents=True, exist_ok=True)
    for o in home.glob('gpu.tar.*'): o.unlink()
    data = box.getbuffer()
    for i,start in enumerate(range(0, len(data), piece)):
        (home/f'gpu.tar.{i:02d}').write_bytes(data[start:start+piece])

def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    for o in ('out','path','home'): setattr(args, o, getattr(args, o) and getattr(args, o).resolve())
    if args.one: return run_here(args)
    if args.parts == ['pack']:
        return importlib.import_module('gpu_pack').pack(args.path, args.data.split(','), dry=args.dry)
    unknown = [o for o in args.parts if o not in PARTS]
    if unknown: p.error(f"part {unknown[0]!r} is unknown: choose from {', '.join(PARTS)}, or pack alone")
    if args.limit < 1: p.error(f'--limit={args.limit:g} must be at least 1: seconds in all')
    before = len(lines(args.out))
    run_parts(args, args.parts or list(PARTS))
    found = lines(args.out)[before:]
    errors = [o for o in found if 'error' in o]
    print(f"{len(found)} findings in {args.out/'lines.jsonl'}, {len(errors)} of them errors")
    for o in errors: print(f"  {o['part']}, {o['what']}: {o['error']}")

if __name__ == '__main__': main()
