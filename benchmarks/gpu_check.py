"""Part `check` of gpu.py: is the library right on a GPU, and does a training step ever wait for it?"""
import importlib.util, os, re, signal, subprocess, sys, time, pytest, torch
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from fastai.vision.all import Callback, Learner, ProgressCallback, default_device, noop, set_seed
from fastai_jocor.all import JoCorCallback, digits_dls, jocor_mlp
from fastai_jocor.lab.run import fast_adam
from gpu import attempt
from gpu_step import DeviceLoss

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tests'))
from sync import guard_steps

RULES = dict(evidence={}, schedule=dict(rule='schedule', forget_rate=.5, num_gradual=0), graphs=dict(graphs=True))
TESTS = 'graphs','losses','selection','peers','callback','trainer','methods','evidence_fits','faults','resume'

def learner(device, k=3, bs=25, epochs=1, cbs=None, **kwargs):
    "Train k perceptrons on digits for some epochs of 50 steps; the same weights and batches on every device"
    set_seed(0)
    nets = [jocor_mlp(10, 64) for _ in range(k)]
    learn = Learner(digits_dls('symmetric:0.5', bs=bs, device=device), nets[0], opt_func=fast_adam, cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    learn.fit(epochs, 1e-3, cbs=JoCorCallback(k, models=nets, seed=0, **kwargs))
    return learn

# --- waiting

@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode('error')
    try: yield
    finally: torch.cuda.set_sync_debug_mode('default')

class NoWaiting(Callback):
    "From the second step of an epoch on, waiting for the GPU between two batches is an error, but for the loader"
    order,run_valid = -200,False
    def before_batch(self): torch.cuda.set_sync_debug_mode('error' if self.iter else 'default')
    def after_batch(self): torch.cuda.set_sync_debug_mode('default') # first of all, the recorder among them

def waits(args, rule, whole):
    "Train; an error is raised where something waits"
    if args.device == 'cpu': return dict(skipped='nothing waits for a CPU')
    with pytest.MonkeyPatch.context() as m:
        if not whole: guard_steps(m, no_waiting, first=1)
        try: learner('cuda', epochs=3, cbs=[DeviceLoss(), *[NoWaiting()]*whole], **RULES[rule])
        finally: torch.cuda.set_sync_debug_mode('default')
    return dict(waits=False)

# --- equality

def weights(learn): return [p.detach().cpu().double() for p in learn.model.parameters()]

def differs(args, rule, bound):
    "The largest difference of a weight after 50 steps on the device and on a CPU"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pairs = zip(*[weights(learner(d, **RULES[rule])) for d in (args.device,'cpu')])
    worst = max(float((a-b).abs().max()) for a,b in pairs)
    return dict(difference=worst, bound=bound, equal=worst <= bound)

# --- tests

def outcomes(text):
    "What became of each test, from the lines of `pytest -v`, with or without processes"
    states = 'PASSED|FAILED|ERROR|SKIPPED|XFAIL'
    name = r'(tests/test_\w+\.py::\S.*?)'
    after,before = re.compile(rf'^{name} ({states})\b'),re.compile(rf'\b({states}) {name}(?: - (.*))?$')
    res,why = {},{}
    for line in text.splitlines():
        if m := after.match(line): res[m[1]] = m[2]
        elif m := before.search(line):
            res[m[2]] = m[1]
            if m[3]: why[m[2]] = m[3][:200]
    return res,why

def test_command(args):
    if args.tiny: return ['tests/test_selection.py', '-k', 'schedule']
    side_by_side = ['-n', str(min(8, os.cpu_count()))] if importlib.util.find_spec('xdist') else []
    return [*(f'tests/test_{o}.py' for o in TESTS), *side_by_side]

def tests(args, note):
    "Run tests with the device as default, and note how many went well, and which did not"
    args.out.mkdir(parents=True, exist_ok=True)
    log,left = args.out/'tests.txt',args.until-time.time()-5
    command = [sys.executable, '-W', 'ignore', '-m', 'pytest', '-v', '-rfE', '--tb=short', '-p', 'no:cacheprovider']
    with log.open('w') as f:
        env = os.environ | dict(FASTAI_JOCOR_DEVICE=args.device)
        p = subprocess.Popen([*command, *test_command(args)], cwd=ROOT, env=env, stdout=f, stderr=subprocess.STDOUT)
        try: code = p.wait(max(left, 1))
        except subprocess.TimeoutExpired:
            p.send_signal(signal.SIGINT) # so that it tells what failed so far
            try: p.wait(2)
            except subprocess.TimeoutExpired: p.kill()
            code = 'stopped at the time limit'
    res,why = outcomes(log.read_text(errors='replace'))
    count = Counter(res.values())
    note('tests', exit=code, **{o.lower(): n for o,n in sorted(count.items())})
    for name,o in res.items():
        if o in ('FAILED','ERROR'): note('test', name=name, outcome=o.lower(), why=why.get(name, ''))

def check(args, note):
    default_device(args.device == 'cuda')
    for rule in RULES:
        for whole in (False,True):
            attempt(note, f"{rule}: does {'a step' if whole else 'the callback'} wait", waits, args, rule, whole)
    for rule in RULES:
        attempt(note, f'{rule}: as on a CPU', differs, args, rule, 1e-4)
    tests(args, note)
