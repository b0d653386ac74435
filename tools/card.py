"""Draw the picture that is shown where a page is shared, nbs/images/card.png, from the logo: python tools/card.py"""
import sys
from pathlib import Path
from xml.etree import ElementTree

IMAGES = Path(__file__).resolve().parent.parent/'nbs'/'images'
SIZE = (1200, 630)

def circles(svg=IMAGES/'logo.svg'):
    "The circles of the logo as numbers and colours"
    for c in ElementTree.parse(svg).iter('{http://www.w3.org/2000/svg}circle'):
        a = c.attrib
        yield dict(xy=(float(a['cx']), float(a['cy'])), r=float(a['r']), fill=a['fill'],
                   stroke=a.get('stroke', 'none'), width=float(a.get('stroke-width', 0)))

def draw(out=IMAGES/'card.png'):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    w,h = SIZE
    fig = plt.figure(figsize=(w/100, h/100), dpi=100, facecolor='#10202e')
    ax = fig.add_axes((0,0,1,1), xlim=(0,w), ylim=(h,0))
    ax.axis('off')
    scale,left,top = 5.2,50,150
    for c in circles():
        x,y = c['xy']
        colours = dict(fc=c['fill'], ec=c['stroke'], lw=scale*c['width']*72/100)
        ax.add_patch(plt.Circle((left+scale*x, top+scale*y), scale*c['r'], **colours))
    text = dict(color='white', va='center', fontfamily='DejaVu Sans')
    ax.text(440, 205, 'fastai_jocor', fontsize=56, fontweight='bold', **text)
    claim = 'Train several networks together\non noisy labels, in one line of fastai'
    ax.text(440, 310, claim, fontsize=24, linespacing=1.5, **text)
    code = text | dict(fontfamily='DejaVu Sans Mono', color='#ffc27d')
    ax.text(440, 435, 'learn.fit_one_cycle(n, cbs=JoCorCallback(k=3))', fontsize=18, **code)
    fig.savefig(out, dpi=100, facecolor=fig.get_facecolor(), metadata=dict(Software=None))
    plt.close(fig)

if __name__ == '__main__': sys.exit(draw(*sys.argv[1:]))
