"A run that is killed five times ends with the same bits."
import math, os, subprocess, sys, pytest, torch
from pathlib import Path
from fastai_jocor.all import *

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
@pytest.mark.parametrize('opt', ('adam','fused'))
def test_killed_and_continued(tmp_path, opt):
    p = subprocess.run([sys.executable,'-W','ignore',str(Path(__file__).parent/'resume_script.py'),str(tmp_path),opt], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-3000:]
    a,b = [torch.load(tmp_path/d/'end.pt', weights_only=False) for d in ('whole','cut')]
    assert len(a['weights']) == 12 and all(torch.equal(x,y) for x,y in zip(a['weights'], b['weights']))
    assert a['estimate'] == b['estimate'] and a['warm_up'] == 4 and a['history']['noise_rate'][3:] == [a['estimate'].rate]*7
    assert a['ledger'].keys() == b['ledger'].keys()
    assert all(torch.equal(x, b['ledger'][k]) or k in ('last_loss','recent_loss') and torch.equal(x.nan_to_num(-1), b['ledger'][k].nan_to_num(-1)) for k,x in a['ledger'].items())
    for o in (a,b): assert all(math.isnan(r) for r in o['history'].pop('noise_rate')[:3])
    assert a['history'] == b['history'] and a['history']['epoch'] == list(range(10)) and len(set(a['history']['R'])) > 3
    assert len(b['table']) == 10 and [r[:3] for r in a['table']] == [r[:3] for r in b['table']]
    flat = lambda o: [t for v in (o.values() if isinstance(o, dict) else o) for t in flat(v)] if isinstance(o, (dict,list,tuple)) else [o]
    for x,y in zip(flat(a['opt']), flat(b['opt'])): assert torch.equal(x,y) if isinstance(x, torch.Tensor) else x == y
