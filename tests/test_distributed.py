"Two real processes on the CPU (gloo), against one process on the union of their batches."
import os, subprocess, sys, pytest, torch
import pandas as pd
from pathlib import Path
from fastai_jocor.copies import all_differ
from distributed_script import Net
import reference

pytest.importorskip('accelerate', reason='accelerate is not installed: two processes cannot be tried')

SCRIPT = Path(__file__).parent/'distributed_script.py'
RUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']

def two_processes(out, *args):
    "What both ranks wrote"
    env = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    p = subprocess.run([*RUN, SCRIPT, out, *map(str, args)], capture_output=True, text=True, env=env)
    assert p.returncode == 0, p.stderr[-3000:]
    return [torch.load(out/f'rank{r}.pt', weights_only=False) for r in (0,1)]

def nets_of(state):
    "The three peers of a saved state"
    nets = [Net() for _ in range(3)]
    for i,m in enumerate(nets):
        own = f'peers.{i}.'
        m.load_state_dict({name[len(own):]: o for name,o in state.items() if name.startswith(own)})
    return nets

def sgd(nets): return torch.optim.SGD([p for m in nets for p in m.parameters()], lr=.1)
def losses(nets, x, y): return reference.joint_losses([m(x) for m in nets], y)
def same_state(a, b): return all(torch.equal(a[name], b[name]) for name in a)

def assert_moved(nets, others):
    assert all(not torch.equal(p, q) for m,t in zip(nets, others) for p,q in zip(m.parameters(), t.parameters()))

def pairs(a, b):
    "The batches of both processes, side by side"
    return [((x0,y0),(x1,y1),rate) for (x0,y0,rate),(x1,y1,_) in zip(a['batches'], b['batches'])]

def one_process(a, b, select):
    "The same batches in one process; also the places that are kept in each union"
    nets,kept = nets_of(a['start']),[]
    opt = sgd(nets)
    for first,second,rate in pairs(a, b):
        parts = [losses(nets, *first), losses(nets, *second)]
        if select == 'global':
            union = torch.cat(parts)
            small = reference.smallest(union, rate)
            loss = union[small].mean()
        else:
            own = [reference.smallest(l, rate) for l in parts]
            loss = sum(l[s].mean() for l,s in zip(parts, own))/2
            small = torch.cat([own[0], own[1]+len(parts[0])])
        kept.append(small)
        reference.step(opt, loss)
    return nets,kept

@pytest.mark.parametrize('select', ('global','local'))
def test_two_processes_are_one(tmp_path, select):
    a,b = two_processes(tmp_path, select, 1001)
    assert same_state(a['start'], b['start']) and same_state(a['final'], b['final'])
    start = nets_of(a['start'])
    assert all_differ(start)
    nets,kept = one_process(a, b, select)
    reference.assert_same_weights(nets_of(a['final']), nets)
    assert_moved(nets, start)
    other,_ = one_process(a, b, 'local' if select == 'global' else 'global')
    apart = [(p-q).abs().max() for m,t in zip(nets, other) for p,q in zip(m.parameters(), t.parameters())]
    assert max(apart) > 1e-6 and a['valid'] == b['valid']
    the_table(a, b, kept)
    the_ledger(a, b)

def the_table(a, b, kept):
    "The item that fills up the last batch counts once"
    n,per_epoch = a['n'],len(kept)//2
    assert n % 2 == 1 and sum(len(y) for _,y,_ in a['batches']) == n+1
    sizes = [len(y0)+len(y1) for (_,y0),(_,y1),_ in pairs(a, b)]
    for e in (0,1):
        part = range(e*per_epoch, (e+1)*per_epoch)
        repeat_kept = int(sizes[part[-1]]-1 in kept[part[-1]])
        want = (sum(len(kept[i]) for i in part) - repeat_kept)/n
        assert a['history']['kept'][e] == b['history']['kept'][e] == pytest.approx(want, abs=1e-9)
        assert a['history']['label_precision'][e] == b['history']['label_precision'][e] > .5

def the_ledger(a, b):
    "Both processes hold the ledger of the union of what they saw"
    pd.testing.assert_frame_equal(a['items'], b['items'])
    seen,f = {},a['items']
    for e in (0,1):
        assert len(a['seen'][e]) == len(b['seen'][e]) == (a['n']+1)//2
        for o in a['seen'][e] + b['seen'][e][:-1]: seen.setdefault(o['item'], []).append(o)
    assert len(seen) == a['n'] == len(f) and (f.seen == 2).all()
    for i,o in seen.items():
        mean = lambda name: sum(s[name] for s in o)/2
        for name in ('loss','prob','conf'): assert f[name][i] == pytest.approx(mean(name), rel=1e-4, abs=1e-5)
        assert f.votes_given[i] == sum(s['vote'] == s['given'] for s in o)/2 and f.agreement[i] == mean('agree')
        assert f.given_label[i] == o[0]['given'] and f.predicted_label[i] == o[0]['vote']
    the_estimate(a, b)

def the_estimate(a, b):
    "That of the first process counts"
    assert a['estimate'] == b['estimate'] and a['estimate'].rate == .1 and 0 < a['estimate'].joint < 1
    assert torch.equal(a['behind'], b['behind']) and a['behind'].shape == (10,) and (a['behind'] > 0).any()
    assert a['rates'] == b['rates'] == [0., 0., a['estimate'].rate]

def teach(nets, x, y, rate, plus):
    "The sum over the peers of their mean loss over what they are taught, and how many items these are"
    zs = [m(x) for m in nets]
    chosen = reference.taught([z.detach() for z in zs], y, rate, plus)
    loss = sum(reference.mean_of(reference.cross_entropy(z, y), idx) for z,idx in zip(zs, chosen))
    return loss,sum(map(len, chosen))

@pytest.mark.parametrize('select', ('global','local'))
@pytest.mark.parametrize('method', ('CoTeachingCallback','CoTeachingPlusCallback'))
def test_two_processes_teach_as_one(tmp_path, method, select):
    a,b = two_processes(tmp_path, select, 1002, method)
    assert a['n'] % 2 == 0 and same_state(a['final'], b['final'])
    nets,counts = nets_of(a['start']),[]
    opt = sgd(nets)
    for first,second,rate in pairs(a, b):
        parts = [first, second]
        if select == 'global': parts = [tuple(map(torch.cat, zip(first, second)))]
        losses,ns = zip(*[teach(nets, x, y, rate, 'Plus' in method) for x,y in parts])
        reference.step(opt, sum(losses)/len(parts))
        counts.append(sum(ns)/3)
    reference.assert_same_weights(nets_of(a['final']), nets)
    assert_moved(nets, nets_of(a['start']))
    first_epoch = sum(counts[:len(counts)//2])
    assert a['history']['kept'] == b['history']['kept']
    assert a['history']['kept'][0] == pytest.approx(first_epoch/a['n'], rel=1e-6)
