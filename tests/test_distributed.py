"Two real processes on the CPU (gloo), against one process on the union of their batches."
import os, subprocess, sys, numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from pathlib import Path
from fastai_jocor.all import *

pytest.importorskip('accelerate', reason='accelerate is not installed: two processes cannot be tried')

def two_processes(out, *args):
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    script = Path(__file__).parent/'distributed_script.py'
    p = subprocess.run([sys.executable,'-m','torch.distributed.run','--standalone','--nproc_per_node','2',str(script),str(out),*map(str,args)], capture_output=True, text=True, env=env)
    assert p.returncode == 0, p.stderr[-3000:]
    return [torch.load(out/f'rank{r}.pt', weights_only=False) for r in (0,1)]

def nets_of(state):
    nets = [jocor_mlp(10, 64, 32) for _ in range(3)]
    for i,m in enumerate(nets): m.load_state_dict({k[len(f'peers.{i}.'):]: v for k,v in state.items() if k.startswith(f'peers.{i}.')})
    return nets

def losses(nets, x, y): return joint_loss(torch.stack([m(x) for m in nets]), y, .8)

def one_process(ranks, select):
    "The same batches in one process; also how many items it keeps and how many are clean among them, without the repeats"
    nets = nets_of(ranks[0]['start'])
    opt = torch.optim.SGD([p for m in nets for p in m.parameters()], lr=.1)
    kept = []
    for (x0,y0,rate),(x1,y1,_) in zip(ranks[0]['batches'], ranks[1]['batches']):
        parts,n = [losses(nets,x0,y0), losses(nets,x1,y1)],len(y0)+len(y1)
        if select == 'global':
            l = torch.cat(parts)
            sel = np.argsort(l.detach().numpy(), kind='stable')[:int((1-rate)*n)]
            loss = l[torch.as_tensor(sel)].mean()
            kept.append(sel)
        else:
            sel = [np.argsort(l.detach().numpy(), kind='stable')[:int((1-rate)*len(l))] for l in parts]
            loss = sum(l[torch.as_tensor(s)].mean() for l,s in zip(parts,sel))/2
            kept.append(np.concatenate([sel[0], sel[1]+len(y0)]))
        opt.zero_grad(); loss.backward(); opt.step()
    return nets,kept

@pytest.mark.parametrize('select', ('global','local'))
def test_two_processes_are_one(tmp_path, select):
    a,b = two_processes(tmp_path, select, 1001)
    assert all(torch.equal(a['start'][k], b['start'][k]) and torch.equal(a['final'][k], b['final'][k]) for k in a['start'])
    peers = nets_of(a['start'])
    assert all_differ(peers)
    nets,kept = one_process((a,b), select)
    for m,t in zip(nets_of(a['final']), nets):
        for p,q in zip(m.parameters(), t.parameters()): torch.testing.assert_close(p, q, atol=1e-5, rtol=0)
    assert any(not torch.equal(p,q) for m,t in zip(nets, peers) for p,q in zip(m.parameters(), t.parameters()))

    n,per_epoch = a['n'],len(kept)//2
    assert n % 2 == 1 and sum(len(y) for _,y,_ in a['batches'])*2 == 2*(n+1)
    sizes = [len(y0)+len(y1) for (_,y0,_),(_,y1,_) in zip(a['batches'], b['batches'])]
    for e in (0,1):
        part = range(e*per_epoch, (e+1)*per_epoch)
        repeat_kept = sizes[part[-1]]-1 in kept[part[-1]]
        assert a['history']['kept'][e] == b['history']['kept'][e] == pytest.approx((sum(len(kept[i]) for i in part) - repeat_kept)/n, abs=1e-9)
        assert a['history']['label_precision'][e] == b['history']['label_precision'][e] > .5
    other = one_process((a,b), 'local' if select=='global' else 'global')[0]
    assert any((p-q).abs().max() > 1e-4 for m,t in zip(nets,other) for p,q in zip(m.parameters(), t.parameters()))
    assert a['valid'] == b['valid']
    the_ledger(a, b)

def the_ledger(a, b):
    "Both processes hold the ledger of the union of what they saw, the item that fills up the last batch once"
    pd.testing.assert_frame_equal(a['items'], b['items'])
    seen = {}
    for e in (0,1):
        assert len(a['seen'][e]) == len(b['seen'][e]) == (a['n']+1)//2
        for o in a['seen'][e] + b['seen'][e][:-1]: seen.setdefault(o['item'], []).append(o)
    f = a['items']
    assert len(seen) == a['n'] == len(f) and (f.seen == 2).all()
    for i,o in seen.items():
        for name in ('loss','prob','conf'): assert f[name][i] == pytest.approx(sum(s[name] for s in o)/2, rel=1e-4, abs=1e-5)
        assert f.votes_given[i] == sum(s['vote'] == s['given'] for s in o)/2 and f.agreement[i] == sum(s['agree'] for s in o)/2
        assert f.given_label[i] == o[0]['given'] and f.predicted_label[i] == o[0]['vote']
    assert a['estimate'] == b['estimate'] and a['estimate'].rate == .1 and 0 < a['estimate'].joint < 1
    assert torch.equal(a['behind'], b['behind']) and a['behind'].shape == (10,) and (a['behind'] > 0).any()
    assert a['rates'] == b['rates'] == [0., 0., a['estimate'].rate]

def taught(nets, x, y, rate, plus):
    "Mean loss of each of three networks over what the next one chose among (x, y), and how many items these are"
    zs = [m(x) for m in nets]
    each,best = [F.cross_entropy(z, y, reduction='none') for z in zs],[z.argmax(-1) for z in zs]
    total,n = 0.,0
    for m,t in ((0,1),(1,2),(2,0)):
        among = np.flatnonzero((best[m] != best[t]).numpy() | (not plus))
        if not len(among): continue
        sel = among[np.argsort(each[t].detach().numpy()[among], kind='stable')[:max(int((1-rate)*len(among)), 1)]]
        total,n = total + each[m][torch.as_tensor(sel)].mean(),n+len(sel)
    return total,n

@pytest.mark.parametrize('select', ('global','local'))
@pytest.mark.parametrize('method', ('CoTeachingCallback','CoTeachingPlusCallback'))
def test_two_processes_teach_as_one(tmp_path, method, select):
    a,b = two_processes(tmp_path, select, 1002, method)
    assert a['n'] % 2 == 0 and all(torch.equal(a['final'][k], b['final'][k]) for k in a['start'])
    nets,kept = nets_of(a['start']),0
    opt = torch.optim.SGD([p for m in nets for p in m.parameters()], lr=.1)
    for i,((x0,y0,rate),(x1,y1,_)) in enumerate(zip(a['batches'], b['batches'])):
        parts = [(torch.cat([x0,x1]),torch.cat([y0,y1]))] if select == 'global' else [(x0,y0),(x1,y1)]
        losses,counts = zip(*[taught(nets, x, y, rate, 'Plus' in method) for x,y in parts])
        opt.zero_grad(); (sum(losses)/len(parts)).backward(); opt.step()
        if i < len(a['batches'])//2: kept += sum(counts)/3
    for m,t,s in zip(nets_of(a['final']), nets, nets_of(a['start'])):
        for p,q,o in zip(m.parameters(), t.parameters(), s.parameters()):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=0)
            assert not torch.equal(q, o)
    assert a['history']['kept'] == b['history']['kept'] and a['history']['kept'][0] == pytest.approx(kept/a['n'], rel=1e-6)
