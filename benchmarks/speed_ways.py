"""What else was tried to make k peers faster, for `speed.py ways`: stacked or compiled networks, optimizers."""
import copy, torch
import torch.nn.functional as F
from fastai.vision.all import Adam
from fastai_jocor.all import jocor_cnn, jocor_mlp
from fastai_jocor.lab.run import fast_adam
from timing import in_turn, ratio, seconds

class AllAtOnce(torch.autograd.Function):
    "Linear layers of k networks as one node of the graph, without items whose gradients are 0"
    @staticmethod
    def forward(ctx, left, x, *params):
        ws,bs = params[:len(params)//2],params[len(params)//2:]
        ctx.left = left
        ctx.save_for_backward(x, *ws)
        out = x.new_empty(len(ws), x.shape[-2], len(bs[0]))
        for i,(w,b) in enumerate(zip(ws, bs)): torch.addmm(b, x if x.ndim == 2 else x[i], w.t(), out=out[i])
        return out

    @staticmethod
    def backward(ctx, g):
        x,*ws = ctx.saved_tensors
        if not ctx.left: ctx.left.append(g.abs().sum((0,-1)).nonzero()[:,0])
        n,rows = x.shape[-2],ctx.left[0]
        if len(rows) < n: x,g = x.index_select(-2, rows),g.index_select(1, rows)
        dw = [o.t() @ (x if x.ndim == 2 else x[i]) for i,o in enumerate(g)]
        dx = torch.stack([o @ w for o,w in zip(g, ws)]) if ctx.needs_input_grad[1] else None
        if dx is not None and len(rows) < n: dx = dx.new_zeros(len(ws), n, dx.shape[-1]).index_copy_(1, rows, dx)
        return None,dx,*dw,*g.sum(1).unbind()

def perceptrons(nets, x):
    "Perceptrons of one hidden layer by `AllAtOnce`"
    left,x = [],x.flatten(1)
    layers = [[m[i] for m in nets] for i in (1,3)]
    for i,ms in enumerate(layers):
        x = AllAtOnce.apply(left, x.relu() if i else x, *[m.weight for m in ms], *[m.bias for m in ms])
    return x

def one_product(nets, x):
    "The same, with the first layers of all networks as one, and their weights copied together at each step"
    first,last = ([m[i] for m in nets] for i in (1,3))
    x = F.linear(x.flatten(1), torch.cat([m.weight for m in first]), torch.cat([m.bias for m in first])).relu()
    x = x.view(len(x), len(nets), -1).transpose(0, 1)
    ws,bs = torch.stack([m.weight for m in last]),torch.stack([m.bias for m in last])
    return torch.baddbmm(bs[:,None], x, ws.transpose(1, 2))

def loop(nets, x): return torch.stack([m(x) for m in nets])

def kept_step(forward, nets, x, keep):
    "Forward and backward, where a share of the items counts"
    kept = torch.arange(int(keep*len(x)))
    def step():
        z = forward(nets, x).log_softmax(-1)
        z.index_select(1, kept).mean().backward()
        for m in nets:
            for p in m.parameters(): p.grad = None
    return step

def few_operations(rounds, times=30):
    x,out = torch.rand(128,1,28,28),{}
    for k in (2,3,5):
        nets = [jocor_mlp() for _ in range(k)]
        for keep in (1.,.5,.2):
            fs = {f.__name__: kept_step(f, nets, x, keep) for f in (loop,perceptrons,one_product)}
            for f in fs.values(): f()
            runs = in_turn({name: repeated(f, times) for name,f in fs.items()}, rounds)
            ratios = {name: ratio(runs[name], runs['loop']) for name in ('perceptrons','one_product')}
            out |= {f'{name} against loop, k={k}, {keep:.0%} kept': r for name,r in ratios.items()}
    return out

def repeated(f, times): return lambda: seconds(lambda: [f() for _ in range(times)])/times

def stacked_step(nets, x, y):
    "Forward and backward over k networks as one, by `torch.func`"
    from torch.func import functional_call, stack_module_state
    ps,bs = stack_module_state(nets)
    base = copy.deepcopy(nets[0]).to('meta')
    f = torch.vmap(lambda p,b,x: functional_call(base, (p,b), (x,)), in_dims=(0,0,None), randomness='different')
    def step():
        F.cross_entropy(f(ps, bs, x).flatten(0,1), y.repeat(len(nets))).backward()
        for p in ps.values(): p.grad = None
    return step

def looped_step(nets, x, y, half=False):
    def step():
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=half): zs = torch.stack([m(x) for m in nets])
        F.cross_entropy(zs.float().flatten(0,1), y.repeat(len(nets))).backward()
        for m in nets:
            for p in m.parameters(): p.grad = None
    return step

def ways_of(make, x, k, rounds, times):
    y,nets = torch.randint(0, 10, (len(x),)),[make() for _ in range(k)]
    last = lambda ms: [copy.deepcopy(m).to(memory_format=torch.channels_last) for m in ms]
    xl = x.to(memory_format=torch.channels_last)
    fs = dict(loop=looped_step(nets, x, y), stacked=stacked_step(nets, x, y),
              channels_last=looped_step(last(nets), xl, y),
              channels_last_bfloat16=looped_step(last(nets), xl, y, True))
    try:
        compiled = looped_step([torch.compile(m) for m in last(nets)], xl, y)
        first = seconds(compiled)
        fs['channels_last_compiled'] = compiled
    except Exception as e: first = f'no compiler: {type(e).__name__}'
    for f in fs.values(): f()
    runs = in_turn({name: repeated(f, times) for name,f in fs.items()}, rounds)
    ratios = {f'{name} against loop': ratio(runs[name], runs['loop']) for name in fs if name != 'loop'}
    return dict(k=k, seconds_to_compile=first, **ratios)

def optimizers(rounds, k=3):
    nets = [jocor_mlp() for _ in range(k)]
    ps = [p for m in nets for p in m.parameters()]
    for p in ps: p.grad = torch.randn_like(p)*1e-3
    fs = dict(fused=fast_adam(ps, lr=1e-3), foreach=torch.optim.Adam(ps, lr=1e-3, foreach=True),
              fastai=Adam(ps, lr=1e-3))
    for o in fs.values(): o.step()
    runs = in_turn({name: repeated(o.step, 100) for name,o in fs.items()}, rounds)
    return {f'{name} Adam against fused': ratio(runs[name], runs['fused']) for name in ('foreach','fastai')}

def ways(path, rounds, n):
    return {'perceptron, batch 128': ways_of(jocor_mlp, torch.rand(128,1,28,28), 3, rounds, 30),
            '7-layer network, batch 64': ways_of(jocor_cnn, torch.rand(64,3,32,32), 3, rounds, 1),
            'perceptrons in fewer operations, batch 128': few_operations(rounds),
            'optimizer, perceptron k=3': optimizers(rounds)}
