# Reads messages with Perl's MIME::Parser, which shares no code with us or with Python's email package.
#
#   perl parse_mime.pl MESSAGE...
#
# A MESSAGE is a file as it went over the wire (CRLF). Prints one line of JSON a message: subject (encoded words
# decoded), tree (the multiparts), parts (the leaves; body in base64, out of its transfer encoding), faults.
use strict;
use warnings;
use Encode qw(decode);
use JSON::PP;
use MIME::Base64 qw(encode_base64);
use MIME::Parser;

my $json = JSON::PP->new->canonical->ascii;
for my $path (@ARGV) {
    my $parser = MIME::Parser->new;
    $parser->output_to_core(1);
    $parser->tmp_to_core(1);
    my $entity = $parser->parse_open($path);
    my ( @tree, @parts );
    for my $part ( $entity->parts_DFS ) {
        if ( $part->parts ) { push @tree, $part->mime_type; next }
        my $head = $part->head;
        push @parts, {
            type        => $part->mime_type,
            encoding    => $head->mime_encoding,
            charset     => $head->mime_attr('Content-Type.charset') // '',
            name        => $head->recommended_filename // '',
            disposition => $head->mime_attr('Content-Disposition') // '',
            cid         => line( $head->get('Content-ID') ),
            body        => encode_base64( $part->bodyhandle->as_string, '' ),
        };
    }
    my @faults = ( $parser->results->errors, $parser->results->warnings );
    my $subject = decode( 'MIME-Header', line( $entity->head->get('Subject') ) );
    print $json->encode( { subject => $subject, tree => \@tree, parts => \@parts, faults => \@faults } ), "\n";
}

sub line {    # a field's value, unfolded
    my $value = shift // '';
    $value =~ s/\r?\n(?=[ \t])//g;
    $value =~ s/\s+\z//;
    return $value;
}
