//go:build race

package acceptq

const raceDetector = true
