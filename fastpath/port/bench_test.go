package port

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/o7s/o7s-router/lib/packet"
)

// echo opens two ports: the far one sends back what it gets, the near one
// counts and tells.
func echo(tb testing.TB, force Mode) (near *end, got *atomic.Int64, news chan struct{}) {
	l := newLab(tb, 1500)
	var far *end
	got, news = new(atomic.Int64), make(chan struct{}, 1)
	ready := make(chan struct{})
	far = l.mustOpen(1, func(c *Config) {
		c.ForceMode, c.Log = force, nil
		c.Rx = func(frames []*packet.Buf) {
			<-ready
			for _, b := range frames {
				f := b.Bytes()
				copy(f, macs[0])
				copy(f[6:], macs[1])
			}
			_ = far.SendBatch(frames) // the near end notices
		}
	})
	close(ready)
	near = l.mustOpen(0, func(c *Config) {
		c.ForceMode, c.Log = force, nil
		c.Rx = func(frames []*packet.Buf) {
			for _, b := range frames {
				b.Release()
			}
			got.Add(int64(len(frames)))
			select {
			case news <- struct{}{}:
			default:
			}
		}
	})
	return near, got, news
}

func modes() []Mode { return []Mode{ModeNative, ModeGeneric, ModePacket} }

// BenchmarkRoundTrip is one frame to the other end and back, asleep in between.
func BenchmarkRoundTrip(b *testing.B) {
	for _, m := range modes() {
		b.Run(string(m), func(b *testing.B) {
			near, got, news := echo(b, m)
			f := frame(0, 1, 64)
			b.ReportAllocs()
			b.ResetTimer()
			for n := range b.N {
				if err := near.Send(packet.From(f)); err != nil {
					b.Fatal(err)
				}
				for got.Load() <= int64(n) {
					<-news
				}
			}
		})
	}
}

// BenchmarkFlood keeps up to 256 frames on the way; ns/op is for one that went
// there and back.
func BenchmarkFlood(b *testing.B) {
	for _, m := range modes() {
		b.Run(string(m), func(b *testing.B) {
			near, got, news := echo(b, m)
			f := frame(0, 1, 64)
			var batch [32]*packet.Buf
			b.ReportAllocs()
			b.ResetTimer()
			sent, lost := 0, 0
			for sent < b.N {
				for i := range batch {
					batch[i] = packet.From(f)
				}
				if err := near.SendBatch(batch[:]); err != nil {
					b.Fatal(err)
				}
				sent += len(batch)
				for sent-lost-int(got.Load()) > 224 {
					select {
					case <-news:
					case <-time.After(100 * time.Millisecond):
						lost = sent - int(got.Load())
					}
				}
			}
			b.ReportMetric(float64(lost)/float64(sent), "lost/frame")
		})
	}
}
