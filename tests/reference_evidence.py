"The evidence rule, written out: one item after the other, in numpy and float64."
import math, numpy as np, torch
import reference

def softmax(z):
    p = np.exp(z-z.max(-1, keepdims=True))
    return p/p.sum(-1, keepdims=True)

class Rule:
    "What a fit knows of its items, and what it makes of it"
    def __init__(self, hidden, k, n_classes, tau=None, by_margin=True):
        self.hidden,self.k,self.C = [int(o) for o in hidden],k,n_classes
        self.tau,self.looks = tau,by_margin
        self.margin = {}
        self.mean,self.votes,self.labels = np.full((3,n_classes), 1/n_classes)
        self.R = self.against = self.owed = 0.
        self.rows,self.by_margin,self.by_floor = [],0,0

    @property
    def found(self): return 1-max([o['out'] for o in self.rows], default=0.)
    @property
    def U(self): return self.found if self.tau is None else self.tau

    @property
    def threshold(self):
        U = min(max(self.U, .005), .995)
        if not self.looks: return math.inf
        return max(1.5, 2+math.log((1-U)/U))

    @property
    def lam(self): return .8*np.clip((self.against-.3)/.3, 0, 1)

    def margin_of(self, p, y):
        q = np.log(p)-np.log(np.maximum(self.mean, 1e-4))
        return q.max()-q[y]

    def judge(self, zs, y, idx):
        "Margins of a batch's items, as far as they count, from logits (k, N, C)"
        p = softmax(zs).mean(0)
        C = range(self.C)
        best = p.argmax(-1)
        self.mean = .95*self.mean + .05*p.mean(0)
        self.votes = .95*self.votes + .05*np.array([np.mean(best == c) for c in C])
        self.labels = .95*self.labels + .05*np.array([np.mean(y == c) for c in C])
        by = []
        for p_i,y_i,i in zip(p, y, idx):
            now = self.margin_of(p_i, y_i)
            self.margin[i] = (self.margin[i]+now)/2 if i in self.margin else now
            share = self.votes[y_i]/max(self.labels[y_i], 1e-6)
            by.append(self.margin[i]*np.clip((share-.25)/.5, 0, 1))
        return by

    def keep(self, by, idx):
        "Places of the items that are kept"
        n = int(self.owed+self.R*len(by)+1e-6)
        n = min(n, len(by)-1)
        self.owed = min(self.owed+self.R*len(by)-n, len(by))
        may = [j for j in range(len(by)) if self.k > 1 or self.hidden[idx[j]] < 0]
        above = {j for j in may if by[j] > self.threshold}
        floor = {j for j in sorted(may, key=lambda j: -by[j])[:n] if by[j] > 0}
        self.by_margin += len(above)
        self.by_floor += len(floor-above)
        kept = [j for j in may if j not in above|floor]
        return kept or [min(may, key=lambda j: by[j])]

    def close(self, seen):
        "The interval after an epoch, from `(position, logits (k, C), label)` of each item"
        out,inside,against,others = [],[],[],[]
        hidden_items = []
        for i,z,y in seen:
            best,peer = z.argmax(-1),self.hidden[i]
            if peer < 0:
                others.append(softmax(z).mean(0).argmax() == y)
                continue
            p = softmax(z[peer])
            out.append(best[peer] == y)
            inside.append(np.mean([best[m] == y for m in range(self.k) if m != peer]) if self.k > 1 else 0)
            against.append(self.margin_of(p, y) > self.threshold)
            hidden_items.append((y, p))
        self.rows.append(dict(out=np.mean(out), inside=np.mean(inside if self.k > 1 else others),
                              against=np.mean(against), n=len(out), joint=wrong_by_joint(hidden_items, self.C)))
        self.against = self.rows[-1]['against']
        if len(self.rows) > 1:
            now,before = self.rows[-1],self.rows[max(len(self.rows)-3, 0)]
            growth = max(now['out']-before['out'], 0)
            press = max(now['inside']-now['out']-.01-1.5*growth, 0)
            self.R = min(self.U, self.R+min(.25, 2*press))
        return self.interval()

    def interval(self):
        U = self.found
        error = 2*math.sqrt(U*(1-U)/self.rows[-1]['n'])
        return max(0, 2*self.against-U-error), min(1, U+error)

    def rate(self):
        low,high = self.interval()
        return min(max(max(self.rows, key=lambda o: o['out'])['joint'], low), high, .95)

def wrong_by_joint(items, C):
    "The share of wrong labels by confident learning, from `(label, probabilities)`"
    n = [sum(y == c for y,_ in items) for c in range(C)]
    least = [sum(p[y] for y,p in items if y == c)/max(n[c], 1) for c in range(C)]
    counts = np.zeros((C,C))
    for y,p in items:
        best = p.argmax()
        if best != y and n[best] and p[best] >= least[best]: counts[best,y] += 1
        elif p[y] >= least[y]-1e-12: counts[y,y] += 1
    right = sum(counts[c,c]/max(counts[:,c].sum(), 1)*n[c] for c in range(C))
    return 1-right/len(items)

def hide(zs, hidden):
    "The same logits; a peer from which an item is hidden gets no gradient from it"
    hidden = torch.tensor(hidden)[:,None]
    return [torch.where(hidden == m, z.detach(), z) for m,z in enumerate(zs)]

def train(nets, batches, items, hidden, lr, n_classes=10, **kwargs):
    "Train peers on batches `(epoch, x, y)`; gives the rule, the kept places of each batch, R and λ, and the interval"
    rule,opt = Rule(hidden, len(nets), n_classes, **kwargs),reference.adam(nets, lr)
    kept,rates,ends,seen,at = [],[],[],[],None
    for (epoch,x,y),idx in zip(batches, items):
        if epoch != at:
            if seen: ends.append(rule.close(seen))
            at,seen,rule.owed = epoch,[],0.
            rates.append((rule.R, rule.lam))
        zs = [m(x) for m in nets]
        values = torch.stack(zs).detach().numpy()
        kept.append(rule.keep(rule.judge(values, y.numpy(), idx), idx))
        seen += list(zip(idx, values.swapaxes(0, 1), y.numpy()))
        losses = reference.joint_losses(hide(zs, [rule.hidden[i] for i in idx]), y, rule.lam)
        reference.step(opt, losses[torch.as_tensor(kept[-1])].mean())
    ends.append(rule.close(seen))
    return rule,kept,rates,ends
