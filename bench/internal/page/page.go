// Package page writes the measured part of a page.
package page

import (
	"fmt"
	"os"
	"strings"
)

// Write replaces the text between two lines of a page: a comment that names the command
// that writes it, and a comment at its end.
func Write(name, command, text string) error {
	begin, end := "<!-- written by: "+command+" -->\n", "<!-- end of what is written -->\n"
	old, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	before, rest, begun := strings.Cut(string(old), begin)
	_, after, ended := strings.Cut(rest, end)
	if !begun || !ended {
		return fmt.Errorf("%s must have the lines %q and %q", name, begin, end)
	}
	return os.WriteFile(name, []byte(before+begin+"\n"+text+"\n"+end+after), 0o666)
}
