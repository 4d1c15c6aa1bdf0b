//go:build race

package o7s

const raceEnabled = true
