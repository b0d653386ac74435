"A run that is killed five times, and started again by the same line, ends with the same bits."
import math, os, subprocess, sys, pytest, torch
from pathlib import Path
from fastai_jocor.ledger import NoiseEstimate

SCRIPT = Path(__file__).parent/'resume_script.py'

def leaves(o):
    "Tensors and numbers in nested lists and dictionaries"
    if isinstance(o, dict): o = list(o.values())
    if not isinstance(o, (list,tuple)): return [o]
    return [t for v in o for t in leaves(v)]

def same(a, b):
    "Equal, a NaN equal to a NaN"
    a,b = leaves(a),leaves(b)
    if len(a) != len(b): return False
    as_tensor = lambda o: torch.nan_to_num(torch.as_tensor(-1e98 if o is None else o).double(), nan=-1e99)
    return all(torch.equal(as_tensor(x), as_tensor(y)) for x,y in zip(a, b))

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
@pytest.mark.parametrize('opt', ('adam','fused'))
def test_killed_and_continued(tmp_path, opt):
    p = subprocess.run([sys.executable, '-W', 'ignore', SCRIPT, tmp_path, opt], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-3000:]
    whole,cut = [torch.load(tmp_path/d/'end.pt', weights_only=False) for d in ('whole','cut')]
    for name in ('weights','ledger','history','opt','evidence'): assert same(whole[name], cut[name]), name
    assert len(whole['weights']) == 12 and whole['estimate'] == cut['estimate']
    history,estimate = whole['history'],whole['estimate']
    assert isinstance(estimate, NoiseEstimate) and history['epoch'] == list(range(10))
    if opt == 'fused':
        assert whole['warm_up'] == 4 and len(set(history['R'])) > 3
        assert all(math.isnan(o) for o in history['noise_rate'][:3]) and history['noise_rate'][3:] == [estimate.rate]*7
    else: assert history['noise_high'][-1] == estimate.high < 1 and len(whole['evidence']['rows']) == 10
    without_time = [[row[:3] for row in o['table']] for o in (whole,cut)]
    assert len(without_time[0]) == 10 and without_time[0] == without_time[1]
