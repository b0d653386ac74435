"The default rule in two real processes (gloo): what they learn of the labels in an epoch, both know after it."
import os, subprocess, pytest, torch
from pathlib import Path
from test_distributed import RUN, same_state
from test_resume import same

pytest.importorskip('accelerate', reason='accelerate is not installed: two processes cannot be tried')

SCRIPT = Path(__file__).parent/'distributed_evidence.py'

def two_processes(out, spoilt, plus=''):
    "What both ranks wrote; a process that waits for the other in vain runs out of time"
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    p = subprocess.run([*RUN, SCRIPT, out, str(spoilt), plus], capture_output=True, text=True, env=env, timeout=300)
    assert p.returncode == 0, p.stderr[-3000:]
    return [torch.load(out/f'rank{r}.pt', weights_only=False) for r in (0,1)]

@pytest.mark.parametrize('spoilt', (0,1))
def test_both_processes_know_the_same(tmp_path, spoilt):
    "Also where items are not finite, or labels to ignore are met, in one process alone"
    a,b = two_processes(tmp_path, spoilt)
    assert same_state(a['final'], b['final']) and same(a['evidence'], b['evidence'])
    assert same(a['history'], b['history']) and same(vars(a['estimate']), vars(b['estimate']))
    assert len(a['evidence']['rows']) == 8 and a['estimate'].low < a['rate'] < a['estimate'].high
    assert max(a['history']['R']) > 0 and (max(a['history']['non_finite']) > 0) == spoilt
    steps = len(a['counts'])//8
    kept,n = [sum(o[i] for r in (a,b) for o in r['counts'][-steps:]) for i in (0,1)]
    if not spoilt: assert a['history']['kept'][-1] == pytest.approx(kept/n)
    assert .3 < a['history']['kept'][-1] < .9 and a['counts'] != b['counts']

def test_both_processes_have_the_same_early_predictions(tmp_path):
    "Each process sees half of the items in an epoch, and others in the next; in one alone, some are not finite"
    a,b = two_processes(tmp_path, 2, 'early')
    assert same_state(a['final'], b['final']) and torch.equal(a['early'], b['early'])
    assert (a['early'][:,:10].sum(1) > .99).all() and max(a['history']['non_finite']) > 0
