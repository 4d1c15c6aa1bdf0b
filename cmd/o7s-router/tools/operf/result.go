package operf

import (
	"fmt"
	"io"
	"strconv"
	"time"
)

// result is what a test found; JSON as it is printed. Times are in ns where the
// name does not say otherwise.
type result struct {
	Name     string        `json:"name"`
	Test     string        `json:"test"`
	QoS      string        `json:"qos"`
	Size     int           `json:"size"`
	Flood    bool          `json:"flood"`
	Rate     float64       `json:"rate_bps,omitempty"` // asked for
	Duration time.Duration `json:"duration_ns"`        // asked for

	Transmitted      uint64        `json:"transmitted"`
	BytesTransmitted uint64        `json:"bytes_transmitted"`
	TransmitTime     time.Duration `json:"transmit_time_ns"`
	TransmitRate     float64       `json:"transmit_bps"`

	Known      bool          `json:"received_known"` // false: the server does not tell, what follows is empty
	Received   uint64        `json:"received"`
	Bytes      uint64        `json:"bytes_received"`
	Lost       uint64        `json:"lost"`
	Loss       float64       `json:"loss_percent"`
	Late       uint64        `json:"out_of_order"`
	Duplicates uint64        `json:"duplicates"`
	Time       time.Duration `json:"time_ns"` // to the last packet
	Bandwidth  float64       `json:"bandwidth_bps"`
	RTT        *spread       `json:"rtt,omitempty"` // bidirectional
	Gap        *spread       `json:"gap,omitempty"` // unidirectional: between packets, at the server
	TimedOut   bool          `json:"timed_out"`

	Intervals []interval `json:"intervals"`
}

func (c *client) result() result {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := result{
		Name: c.o.name, Test: "uni", QoS: c.o.qosName, Size: c.o.size, Flood: c.o.flood, Duration: c.o.duration,
		Transmitted: c.sent.Load(), Intervals: c.intervals,
	}
	if !c.o.flood {
		r.Rate = c.o.rate
	}
	if r.Intervals == nil {
		r.Intervals = []interval{}
	}
	r.BytesTransmitted = r.Transmitted * uint64(c.o.size)
	if c.stopped.After(c.start) {
		r.TransmitTime = c.stopped.Sub(c.start)
	}
	r.TransmitRate = mega(r.BytesTransmitted, r.TransmitTime) * 1e6
	r.Time = r.TransmitTime
	switch {
	case c.o.bi:
		r.Test = "bi"
		r.Known = true
		r.Received, r.Bytes, r.Late, r.Duplicates = c.track.packets, c.bytes, c.track.late, c.track.dup
		r.RTT = spreadOf(c.rtt)
		if c.last.After(c.start) {
			r.Time = max(r.Time, c.last.Sub(c.start))
		}
	case c.server != nil:
		s := c.server
		r.Known = true
		r.Received, r.Bytes, r.Late, r.Duplicates, r.Gap = s.Packets, s.Bytes, s.Late, s.Duplicates, s.Gap
		r.Time = max(r.Time, s.Elapsed)
	}
	if r.Known {
		r.Lost = r.Transmitted - min(r.Received, r.Transmitted)
		if r.Lost > 0 {
			r.Loss = float64(r.Lost) * 100 / float64(r.Transmitted)
		}
		r.Bandwidth = mega(r.Bytes, r.Time) * 1e6
	}
	return r
}

// print prints r as the reference prints a bidirectional test, and more.
func (r *result) print(w io.Writer) {
	fmt.Fprintf(w, "\n--- %s perf statistics ---\n", r.Name)
	if !r.Known {
		fmt.Fprintf(w, "%d packets transmitted, time: %.3f ms, bandwidth: %.3f Mb/s.\n", r.Transmitted, ms(r.Time), r.TransmitRate/1e6)
		fmt.Fprintln(w, "The server does not tell what it received.")
		return
	}
	fmt.Fprintf(w, "%d packets transmitted, %d received, %s%% packet loss, time: %.3f ms, bandwidth: %.3f Mb/s.\n",
		r.Transmitted, r.Received, strconv.FormatFloat(r.Loss, 'g', 3, 64), ms(r.Time), r.Bandwidth/1e6)
	if r.Late+r.Duplicates > 0 {
		fmt.Fprintf(w, "%d out of order, %d duplicates\n", r.Late, r.Duplicates)
	}
	r.RTT.print(w, "rtt")
	r.Gap.print(w, "gap")
}

func (s *spread) print(w io.Writer, what string) {
	if s != nil {
		fmt.Fprintf(w, "%s p50/p90/p99/p99.9/max = %.3f/%.3f/%.3f/%.3f/%.3f ms\n", what, ms(s.P50), ms(s.P90), ms(s.P99), ms(s.P999), ms(s.Max))
	}
}

func ms(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }
