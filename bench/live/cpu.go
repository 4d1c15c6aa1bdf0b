package live

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// tick is the unit of /proc/stat, fixed for user space (USER_HZ).
const tick = 10 * time.Millisecond

// idle returns how long a CPU has had nothing to do since boot.
func idle(cpu int) (time.Duration, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		var user, nice, system, idle, iowait int64
		if n, _ := fmt.Sscanf(line, fmt.Sprintf("cpu%d %%d %%d %%d %%d %%d", cpu), &user, &nice, &system, &idle, &iowait); n == 5 {
			return time.Duration(idle+iowait) * tick, nil
		}
	}
	return 0, fmt.Errorf("/proc/stat has no cpu%d", cpu)
}

// Pin binds the calling goroutine to one CPU; the returned function ends that.
func Pin(cpu int) (func(), error) {
	runtime.LockOSThread()
	var old, set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &old); err != nil {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("cpu affinity: %w", err)
	}
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("pin to cpu %d: %w", cpu, err)
	}
	return func() {
		// A thread that keeps the binding must not run other goroutines.
		if unix.SchedSetaffinity(0, &old) == nil {
			runtime.UnlockOSThread()
		}
	}, nil
}
